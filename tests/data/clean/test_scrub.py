"""Scrubbing: what must be found is found, what only looks like it stays, and ids of people become hashes."""

from collections import Counter
from datetime import datetime
from ipaddress import IPv4Address, IPv6Address
from urllib.parse import quote

import phonenumbers
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data.clean.scrub import PLACEHOLDERS, HashedIds, Phones, Scrub, scrub, scrub_id, scrub_text
from data.clean.stable_hash import pseudonym
from data.format.dialogue import Dialogue, Message
from data.format.encode import CONTROL_SURFACES

EVERYTHING = Scrub(ids=HashedIds(salt="a salt of tests"))
before = st.sampled_from(["", "write to ", "(", "it is ", "Kontakt: ", "<", "1. ", "\n", "«", "写信给 "])
after = st.sampled_from(["", ".", ", please", ")", "!", "?", " or so", "\n", ">", "»", ": yes"])


def scrubbed(text: str, settings: Scrub = EVERYTHING) -> tuple[str, Counter[str]]:
    counts: Counter[str] = Counter()
    return scrub_text(text, settings, counts), counts


def assert_found(kind: str, before: str, value: str, after: str, settings: Scrub = EVERYTHING) -> None:
    assert scrubbed(before + value + after, settings) == (before + PLACEHOLDERS[kind] + after, {kind: 1}), value


def assert_kept(text: str, settings: Scrub = EVERYTHING) -> None:
    assert scrubbed(text, settings) == (text, {})


@settings(max_examples=300)
@given(before=before, address=st.emails(), after=after)
@example(before="", address="ann@example.com", after="")
@example(before="'", address="ann.o'neil+chat@mail.example.co.uk", after="'")
@example(before="", address="jörg@müller.de", after=".")
@example(before="", address="анна@почта.рф", after="")
@example(before="email=", address="user_1@192-168.example.museum", after="&x=1")
def test_email_addresses_are_found(before: str, address: str, after: str) -> None:
    assume(any(character.isalnum() for character in address.partition("@")[0]))
    text, counts = scrubbed(before + address + after)
    assert "@" not in text and counts["email"] == 1
    assert text.endswith("[email]" + after)
    known = before if not before.endswith("=") else ""  # "email=" may be part of an address
    assert text.startswith(known)


NATIONAL = {  # forms of numbers that regulators set aside for plays and films, so that they are nobody's
    "US": ["(415) 555-0132", "415-555-0132", "415.555.0132", "415 555 0132", "1-415-555-0132", "4155550132"],
    "GB": ["020 7946 0018", "0117 496 0123", "(0161) 496 0999"],
    "DE": ["030 23125 042", "(0)69 90009000", "0171 3920012"],
    "FR": ["01 99 00 12 34", "01.99.00.12.34"],
    "AU": ["(02) 5550 1234", "0491 570 156"],
}


@pytest.mark.parametrize(("region", "number"), [(r, n) for r, numbers in NATIONAL.items() for n in numbers])
def test_phone_numbers_in_national_form_are_found(region: str, number: str) -> None:
    scrub_region = Scrub(phone=Phones(regions=("US", region)))
    for around in ("call %s", "%s", "my number is %s, ask for Ann", "(%s)", "cell:%s."):
        assert scrubbed(around % number, scrub_region) == (around % "[phone]", {"phone": 1})


@settings(max_examples=200)
@given(
    region=st.sampled_from(sorted(phonenumbers.SUPPORTED_REGIONS)),
    form=st.sampled_from([phonenumbers.PhoneNumberFormat.E164, phonenumbers.PhoneNumberFormat.INTERNATIONAL]),
    kind=st.sampled_from([phonenumbers.PhoneNumberType.MOBILE, phonenumbers.PhoneNumberType.FIXED_LINE]),
    before=before.filter(lambda text: text != "1. "),
    after=after,
)
def test_phone_numbers_with_a_country_are_found(region: str, form: int, kind: int, before: str, after: str) -> None:
    number = phonenumbers.example_number_for_type(region, kind)
    assume(number is not None)
    assert_found("phone", before, phonenumbers.format_number(number, form), after)


# Numbers that payment processors publish for tests, and how they are written.
CARDS = [
    "4111111111111111",
    "4242 4242 4242 4242",
    "5555-5555-5555-4444",
    "2223003122003222",
    "3782 822463 10005",
    "371449635398431",
    "6011111111111117",
    "3530111333300000",
    "3056 930902 5904",
    "6200 0000 0000 0005",
]


@pytest.mark.parametrize("number", CARDS)
def test_card_numbers_are_found_and_only_with_their_check_digit(number: str) -> None:
    assert_found("card", "my card is ", number, ", exp 12/27")
    assert_found("card", "", number, " 123")
    assert_found("card", "", number.translate({ord("0") + i: ord("٠") + i for i in range(10)}), " 123")
    wrong = number[:-1] + str((int(number[-1]) + 1) % 10)
    assert "[card]" not in scrubbed(wrong)[0]


@given(prefix=st.sampled_from(["4", "51", "2221", "6011", "35"]), body=st.text("0123456789", min_size=15, max_size=15))
def test_every_number_of_an_issuer_with_its_check_digit_is_a_card(prefix: str, body: str) -> None:
    digits = (prefix + body)[:15]
    total = 0
    for place, digit in enumerate(map(int, digits)):
        total += sum(map(int, str(digit * 2))) if place % 2 == 0 else digit
    number = digits + str(-total % 10)
    assume(not (prefix == "35" and not "3528" <= number[:4] <= "3589"))
    assert_found("card", "card ", number, " ok")
    assert_found("card", "card ", " ".join(number[i : i + 4] for i in range(0, 16, 4)), " ok")


@given(before=before, address=st.ip_addresses(v=4), after=after)
def test_public_ip_addresses_are_found(before: str, address: IPv4Address, after: str) -> None:
    written = str(address)
    if address.is_global and len(written) >= 10:
        assert_found("ip", before, written, after)
        assert scrubbed(f"http://{written}:8080/x?ip={written}")[0] == "http://[ip]:8080/x?ip=[ip]"
    elif not address.is_global:
        assert_kept(before + written + after)


@given(before=before, low=st.integers(0, (1 << 64) - 1), address=st.integers(0x2A00_0000, 0x2A0F_FFFF), after=after)
def test_public_ip_addresses_of_version_6_are_found(before: str, low: int, address: int, after: str) -> None:
    full = IPv6Address((address << 96) | low)
    for written in (str(full), full.exploded, str(full).upper()):
        assert_found("ip", before, written, after)


def test_credentials_leave_the_host_of_a_url() -> None:
    assert scrubbed("see https://ann:s3cr@t@host.example/x?y=1 ok") == (
        "see https://[credentials]@host.example/x?y=1 ok",
        {"url_credentials": 1},
    )
    assert_kept("https://host.example/@ann/12")


def test_of_a_url_the_address_alone_is_replaced() -> None:
    for url in ("https://example.com/page.html?name=John&%s", "see http://x.org/%s", "https://x.org/?mail&%s&n=1 ok"):
        assert scrubbed(url % "ann@mail.example")[0] == url % "[email]"
    assert scrubbed("see https://x.org. a/b&c@mail.example")[0] == "see https://x.org. [email]"


prices = st.builds(
    lambda sign, whole, cents: f"{sign}{whole:,}.{cents:02d}",
    st.sampled_from(["$", "€", "£", "USD "]),
    st.integers(0, 999_999_999),
    st.integers(0, 99),
)
dates = st.builds(
    lambda when, form: when.strftime(form),
    st.datetimes(min_value=datetime(1900, 1, 1), max_value=datetime(2099, 1, 1)),
    st.sampled_from(
        [
            *("%Y-%m-%d", "%d/%m/%Y", "%m/%d/%y", "%d.%m.%Y", "%Y%m%d", "%Y", "%B %d, %Y", "%d %b %Y %H:%M"),
            *("%H:%M:%S", "%I:%M %p", "%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%SZ"),
        ]
    ),
)
versions = st.one_of(
    st.lists(st.integers(0, 99), min_size=2, max_size=3),
    st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.integers(0, 999)),
    st.lists(st.integers(0, 9), min_size=5, max_size=6),
).map(lambda parts: ".".join(map(str, parts)))
scores = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=3).map(
    lambda sets: " ".join(f"{a}-{b}" for a, b in sets)
)
orders = st.builds(
    lambda form, number: form.format(number),
    st.sampled_from(["#{}", "order {}", "Order number: {}", "ORD-{}", "invoice no. {}", "bug #{}", "A{}X", "case {}"]),
    st.integers(1_000, 9_999_999_999),
)
years = st.builds(lambda a, b: f"{a}-{b}", st.integers(1000, 2099), st.integers(1000, 2099))
sizes = st.sampled_from(
    ["1920x1080", "3.14159265358979", "10^10", "2@3.50", "x@5.30pm", "1e-10", "100,000,000", "5'11\""]
)
harmless = st.one_of(prices, dates, versions, scores, orders, years, sizes)


@settings(max_examples=600)
@given(before=before, value=harmless, after=after)
@example(before="version ", value="4.0.249.43", after=" is out")
@example(before="linux-image-", value="2.6.32.21-generic", after="")
@example(before="", value="2018-09-01 12:30:45", after="")
@example(before="", value="std::cout << dead::beef << ::1 << fe80::1", after="")
@example(before="", value="192.168.1.17 and 127.0.0.1/8 and 10.0.0.138", after="")
@example(before="", value="package@16.8.0 by @ann, 10@5.99 each, a @ b", after="")
@example(before="", value="9780306406157 and 978-3-16-148410-0", after="")
@example(before="", value="714682ad-f218-f762-7605-00e7c4baee47", after="")
@example(before="", value="1535760000 and 1535760000123", after="")
@example(before="", value="https://example.com/questions/4155550132?id=4155550132", after="")
def test_what_only_looks_like_personal_data_stays(before: str, value: str, after: str) -> None:
    assert_kept(before + value + after)


fragments = st.one_of(
    st.text(max_size=6),
    st.emails(),
    harmless,
    st.ip_addresses().map(str),
    st.sampled_from(
        [*CARDS, *NATIONAL["US"], "@", "://", ".", ":", "-", " ", "+1", "[email]", "http://a:b@", "www.x.de"]
    ),
)


@settings(max_examples=400)
@given(text=st.lists(fragments, max_size=8).map("".join))
@example(text="http://a:b@http://a:b@x.de")
@example(text="4111 1111 1111 1111 415 555 0132")
def test_scrubbing_twice_is_scrubbing_once(text: str) -> None:
    once, _ = scrubbed(text)
    assert scrubbed(once) == (once, {})


def test_long_hostile_texts_are_read_in_linear_time() -> None:
    """Quadratic time would be minutes for each."""
    for text in ("a." * 200_000 + "@", "1." * 200_000, "a@" * 100_000, "2:" * 200_000, "://" * 100_000, "1" * 400_000):
        assert_kept(text)


def test_every_kind_can_be_left_alone() -> None:
    values = {
        "url_credentials": "ftp://u:p@host",
        "email": "ann@example.com",
        "card": CARDS[0],
        "ip": "81.169.145.78",
        "phone": "(415) 555-0132",
    }
    text = " ".join(values.values())
    for kind, value in values.items():
        off = Scrub.model_validate({kind: None if kind == "phone" else False})
        found, counts = scrubbed(text, off)
        assert value in found and set(counts) == set(values) - {kind}
    with pytest.raises(ValidationError, match="every kind is off"):
        Scrub(email=False, phone=None, card=False, ip=False, url_credentials=False)
    with pytest.raises(ValidationError, match="region 'UK' is unknown"):
        Phones(regions=("UK",))


separators = st.sampled_from(["-", "_", "/", ":", ".", "#", "@", "=", " ", ""])


@settings(max_examples=300)
@given(
    region=st.sampled_from(sorted(phonenumbers.SUPPORTED_REGIONS)),
    form=st.sampled_from([phonenumbers.PhoneNumberFormat.E164, phonenumbers.PhoneNumberFormat.INTERNATIONAL]),
    quoted=st.booleans(),
    before=st.sampled_from(["", "chat", "2018", "tel", "order", "a1"]),
    after=st.sampled_from(["", "3", "0007", "x", "2018-09-01", "415"]),
    between=st.tuples(separators, separators),
)
@example(region="US", form=0, quoted=False, before="chat", after="3", between=("-", "-"))
def test_no_id_holds_a_phone_number_with_its_country(
    region: str, form: int, quoted: bool, before: str, after: str, between: tuple[str, str]
) -> None:
    number = phonenumbers.example_number_for_type(region, phonenumbers.PhoneNumberType.MOBILE)
    assume(number is not None)
    written = phonenumbers.format_number(number, form)
    identity = f"{before}{between[0]}{quote(written) if quoted else written}{between[1]}{after}"
    counts: Counter[str] = Counter()
    assert scrub_id(identity, EVERYTHING, counts) == pseudonym("a salt of tests", "id", identity)
    assert counts["phone"] >= 1


@given(address=st.emails(), before=separators, after=separators)
@example(address="ann_b@example.org", before="_", after="_")
def test_no_id_holds_an_address(address: str, before: str, after: str) -> None:
    assume(any(character.isalnum() for character in address.partition("@")[0]))
    for written in (address, quote(address)):
        identity = f"chat{before}{written}{after}3"
        assert scrub_id(identity, EVERYTHING, Counter()) == pseudonym("a salt of tests", "id", identity)


@pytest.mark.parametrize(
    "identity", ["4155552671_2", "sms_4155552671", "415-555-2671_3", "user:4155552671", "1_81.169.145.78"]
)
def test_no_id_holds_other_values(identity: str) -> None:
    counts: Counter[str] = Counter()
    assert scrub_id(identity, EVERYTHING, counts) != identity and counts.total() == 1


@pytest.mark.parametrize(
    "identity",
    [
        "logs/2018-09-01_12.30.jsonl@4155550132",  # where a line of a large file begins
        "chat-4155550132",
        "2018-09-01T12:30:45+01:00-12345678",
        "2018-09-01T12:30:45+0100_3",
        "c++11_1234567",
        "714682ad-f218-f762-7605-00e7c4baee47",
        "100%_sure",
    ],
)
def test_ids_that_stay(identity: str) -> None:
    assert scrub_id(identity, EVERYTHING, Counter()) == identity


def test_ids_of_dialogues_that_name_a_participant_are_hashed_with_them() -> None:
    for identity in ("u17", "u17/3", "chat_u17_3", "2018-u17", "p.17:u17"):
        dialogue = Dialogue(identity, (Message("Ann", "hi"),), "Ann", ("u1", "u17"))
        result, counts = scrub(dialogue, EVERYTHING)
        assert result.id == pseudonym("a salt of tests", "id", identity) and counts == {"id": 3}
        assert scrub(dialogue, Scrub()) == (dialogue, {})
    for identity in ("u171/3", "xu17", "u", "chat 17"):
        dialogue = Dialogue(identity, (Message("Ann", "hi"),), "Ann", ("u1", "u17"))
        assert scrub(dialogue, EVERYTHING)[0].id == identity


def test_participants_that_are_addresses_are_hashed_without_ids_too() -> None:
    dialogue = Dialogue("d", (Message("Ann", "hi"),), "Ann", ("+14155550132", "p", "ann@example.org", "+14155550132"))
    result, counts = scrub(dialogue, Scrub())
    phone, kept, address, again = result.participants
    assert phone == again != address and kept == "p" and counts == {"phone": 2, "email": 1}
    assert not any(character in phone + address for character in "+@")


def test_a_dialogue_is_scrubbed_everywhere() -> None:
    said = (
        Message("ann@x.org", "I am ann@x.org", 1.0, {"to": "bob@y.org", "ratings": {"ann@x.org": 5, "n": 4155550132}}),
        Message("bob@y.org", "hello", 2.0),
        Message("[email]", "me too"),
    )
    metadata = {"WorkerId": "A1B2", "worker-id": ["A1B2", 7, None], "note": ["415-555-0132"], "score": 0.5}
    dialogue = Dialogue("ann@x.org/1", said, "bob@y.org", ("ann", "bob"), metadata, "chats")
    result, counts = scrub(dialogue, EVERYTHING)
    assert [message.speaker for message in result.messages] == ["[email] 2", "[email] 3", "[email]"]
    assert result.character == "[email] 3"
    assert [message.text for message in result.messages] == ["I am [email]", "hello", "me too"]
    assert result.messages[0].metadata == {"to": "[email] 3", "ratings": {"[email] 2": 5, "n": 4155550132}}
    salt = "a salt of tests"
    assert result.participants == (pseudonym(salt, "ann"), pseudonym(salt, "bob"))
    worker, seven = pseudonym(salt, "A1B2"), pseudonym(salt, "7")
    assert result.metadata["WorkerId"] == worker and result.metadata["worker-id"] == [worker, seven, None]
    assert result.metadata["note"] == ["[phone]"] and result.metadata["score"] == 0.5
    assert "@" not in result.id and result.source == "chats"
    assert [message.time for message in result.messages] == [1.0, 2.0, None]
    assert counts == {"email": 4, "phone": 1, "id": 5}


def test_other_salts_give_other_ids_and_no_salt_leaves_them() -> None:
    dialogue = Dialogue("d", (Message("Ann", "hi"),), "Ann", ("p",), {"worker_id": "w"})
    assert scrub(dialogue, Scrub()) == (dialogue, {})
    first, other = (scrub(dialogue, Scrub(ids=HashedIds(salt=salt)))[0] for salt in ("salt one", "salt two"))
    assert len({first.participants[0], other.participants[0], "p", first.metadata["worker_id"]}) == 4


@given(names=st.lists(st.one_of(st.emails(), st.sampled_from(["[email]", "[email] 2", "Ann"])), min_size=2, max_size=6))
def test_speakers_stay_apart(names: list[str]) -> None:
    names = [name.replace(":", "") for name in names]
    dialogue = Dialogue("d", tuple(Message(name, "hi") for name in names), names[-1])
    result, _ = scrub(dialogue, EVERYTHING)
    new = [message.speaker for message in result.messages]
    assert len(set(zip(names, new, strict=True))) == len(set(names)) == len(set(new))
    assert new[-1] == result.character
    assert scrub(result, EVERYTHING) == (result, {})


def test_placeholders_are_plain_text() -> None:
    joined = "".join(PLACEHOLDERS.values())
    assert not any(surface in joined for surface in CONTROL_SURFACES)
    for placeholder in PLACEHOLDERS.values():
        assert_kept(placeholder)
