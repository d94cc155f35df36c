"""Scrubs personal data: e-mail addresses, phone numbers, payment cards, IP addresses and the credentials of URLs become
placeholders; ids of people become hashes.

A placeholder is a fixed word for each kind, such as `[email]`, so equal values cannot be linked, within a dialogue or
across dialogues. Only speakers stay distinct: two speakers named by their addresses become `[email]` and `[email] 2`.
Obfuscated addresses ("ann at example dot com"), local phone numbers without area code, and numbers in the metadata that
are not strings are not scrubbed.

datatrove's PIIFormatter takes "2@3.50" for an address, misses letters beyond ASCII, finds IP addresses in longer
numbers ("1.2.3.4.5"), and takes time quadratic in the length of a word.
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, Self
from urllib.parse import unquote

from pydantic import Field, field_validator, model_validator

from data.clean.stable_hash import pseudonym
from data.format.dialogue import Dialogue, Message
from recipes.loader import Section

PLACEHOLDERS = {
    "url_credentials": "[credentials]",
    "email": "[email]",
    "card": "[card]",
    "ip": "[ip]",
    "phone": "[phone]",
}  # in the order of the search
HASHED_ID = "id"  # counts of hashed ids


class Phones(Section):
    """Phone numbers: international format (+ and country code) everywhere, national format for these regions."""

    # ISO 3166 codes; US stands for the whole North American plan.
    regions: tuple[str, ...] = ("US",)

    @field_validator("regions")
    @classmethod
    def _known(cls, regions: tuple[str, ...]) -> tuple[str, ...]:
        from phonenumbers import SUPPORTED_REGIONS

        unknown = [region for region in regions if region not in SUPPORTED_REGIONS]
        if unknown:
            raise ValueError(f"region {unknown[0]!r} is unknown; expected ISO 3166 codes such as US, GB, DE")
        return regions


class HashedIds(Section):
    """Hash ids of people: participants, dialogue ids that contain one, and the values of these metadata keys at any
    depth. Speakers' names are kept: the model reads them and prompts contain them."""

    # The salt and a guessed id suffice to check a hash: keep the recipe as safe as the ids.
    salt: str = Field(min_length=8)
    # Case, - and _ are ignored: worker_id also matches WorkerId. Add the keys of your logs, such as user or customer.
    metadata_keys: tuple[str, ...] = ("worker_id", "user_id", "participant_id", "annotator_id", "author_id")


class Scrub(Section):
    """What is scrubbed from texts, speakers' names, ids and metadata; false or null disables a kind.

    Dialogue and participant ids that contain such data are hashed; set `ids` if they could be guessed. Quarantined
    records are scrubbed too and counted separately. With `ids`, quarantine.jsonl has file, line and a reason without
    values, but no text of the record, because ids in a broken record cannot be recognized.
    """

    email: bool = True
    phone: Phones | None = Phones()
    # 14 to 19 digits with an issuer's prefix and a valid check digit.
    card: bool = True
    # Public IPv4 and IPv6 addresses; private ones identify nobody. Addresses of fewer than 10 characters are kept: they
    # look like version numbers.
    ip: bool = True
    # User and password before the host of a URL.
    url_credentials: bool = True
    ids: HashedIds | None = None

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if not any(getattr(self, key) for key in Scrub.model_fields):
            raise ValueError("every kind is off, so it would change nothing; leave the section out")
        return self


def scrub(dialogue: Dialogue, settings: Scrub) -> tuple[Dialogue, Counter[str]]:
    """The dialogue without personal data, and the number of replaced values by kind (a speaker's name counts once)."""
    counts: Counter[str] = Counter()
    speakers = renamed_speakers(dict.fromkeys(m.speaker for m in dialogue.messages), settings, counts)
    messages = tuple(_scrub_message(message, speakers, settings, counts) for message in dialogue.messages)
    identity = scrub_id(dialogue.id, settings, counts)
    if settings.ids:
        participants = tuple(pseudonym(settings.ids.salt, participant) for participant in dialogue.participants)
        counts[HASHED_ID] += len(participants)
        if identity == dialogue.id and any(_stands_in(identity, participant) for participant in dialogue.participants):
            identity = _hash_of_id(identity, settings)
            counts[HASHED_ID] += 1
    else:
        participants = tuple(scrub_id(participant, settings, counts) for participant in dialogue.participants)
    scrubbed = replace(
        dialogue,
        id=identity,
        messages=messages,
        character=speakers.get(dialogue.character, dialogue.character),
        participants=participants,
        metadata=_scrub_metadata(dialogue.metadata, speakers, settings, counts),
    )
    return scrubbed, +counts


def scrub_text(text: str, settings: Scrub, counts: Counter[str]) -> str:
    """The text with placeholders; counts replacements by kind. Idempotent."""
    while _DIGIT_OR_AT.search(text):
        before = text
        for kind in PLACEHOLDERS:
            if getattr(settings, kind):
                text = _REPLACERS[kind](text, settings, counts)
        if text == before:  # a replacement may reveal a value next to it
            break
    return text


def scrub_id(identity: str, settings: Scrub, counts: Counter[str]) -> str:
    """The id, or its hash if it contains personal data: placeholders would make ids equal.

    Stricter than for texts: + and the digits of an international number are a phone number in any surroundings, _
    counts as a space, and %2B as +. A national number joined to other words ("chat-4155550132") is kept, as in texts,
    because serial numbers look the same.
    """
    plain = unquote(identity)
    found: Counter[str] = Counter()
    scrub_text(plain.replace("_", " "), settings, found)
    if not found.total() and "@" in plain:  # an address may contain _
        scrub_text(plain, settings, found)
    if not found.total() and settings.phone:
        found["phone"] += len(_PHONE_OF_COUNTRY.findall(plain))
    if not found.total():
        return identity
    counts.update(found)
    return _hash_of_id(identity, settings)


def renamed_speakers(names: Iterable[str], settings: Scrub, counts: Counter[str]) -> dict[str, str]:
    """New, still distinct names for the names that contain personal data."""
    scrubbed = {name: scrub_text(name, settings, counts) for name in names}
    taken = {name for name, new in scrubbed.items() if new == name}
    renamed = {}
    for name, new in scrubbed.items():
        if new == name:
            continue
        number = 1
        while (distinct := new if number == 1 else f"{new} {number}") in taken:
            number += 1
        taken.add(distinct)
        renamed[name] = distinct
    return renamed


def _hash_of_id(identity: str, settings: Scrub) -> str:
    return pseudonym(settings.ids.salt if settings.ids else "", "id", identity)


def _stands_in(identity: str, participant: str) -> bool:
    """Whether `identity` contains `participant` as a whole word or number."""
    if not participant or participant not in identity:
        return False
    return re.search(rf"(?<![^\W_]){re.escape(participant)}(?![^\W_])", identity) is not None


def _scrub_message(message: Message, speakers: Mapping[str, str], settings: Scrub, counts: Counter[str]) -> Message:
    text = scrub_text(message.text, settings, counts)
    speaker = speakers.get(message.speaker, message.speaker)
    metadata = message.metadata and _scrub_metadata(message.metadata, speakers, settings, counts)
    if text is message.text and speaker is message.speaker and metadata == message.metadata:
        return message
    return replace(message, speaker=speaker, text=text, metadata=metadata)


def _scrub_metadata(value: Any, speakers: Mapping[str, str], settings: Scrub, counts: Counter[str]) -> Any:
    """The same tree with strings and keys scrubbed, and the values of id keys hashed."""
    if isinstance(value, str):
        return speakers.get(value) or scrub_text(value, settings, counts)
    if isinstance(value, list | tuple):
        return [_scrub_metadata(item, speakers, settings, counts) for item in value]
    if not isinstance(value, Mapping):
        return value
    result: dict[str, Any] = {}
    for key, item in value.items():
        new = name = speakers.get(key) or scrub_text(key, settings, counts)
        number = 1
        while new in result:
            number += 1
            new = f"{name} {number}"
        if settings.ids and _plain(key) in map(_plain, settings.ids.metadata_keys):
            result[new] = _hashed(item, settings.ids.salt, counts)
        else:
            result[new] = _scrub_metadata(item, speakers, settings, counts)
    return result


def _plain(key: str) -> str:
    return key.lower().replace("_", "").replace("-", "")


def _hashed(value: Any, salt: str, counts: Counter[str]) -> Any:
    """The hash of an id, or of every id in a list or object; null stays null."""
    if isinstance(value, list | tuple):
        return [_hashed(item, salt, counts) for item in value]
    if isinstance(value, Mapping):
        return {key: _hashed(item, salt, counts) for key, item in value.items()}
    if value is None or isinstance(value, bool):
        return value
    counts[HASHED_ID] += 1
    return pseudonym(salt, str(value))


_DIGIT_OR_AT = re.compile(r"[\d@]")  # everything that is scrubbed contains one of these

_CREDENTIALS = re.compile(r"(?<=://)(?!\[credentials\]@)[^\s/?#<>\"]{1,256}@(?=[\w\[])")

# Only scripts that separate words by spaces: in others a match would include the neighboring words.
_LETTER = "A-Za-z\u00c0-\u024f\u0300-\u052f"
_EMAIL = re.compile(
    rf"(?<![{_LETTER}0-9_])[{_LETTER}0-9_][{_LETTER}0-9_.!#$%&'*+/=?^`{{|}}~-]{{0,63}}@"
    rf"(?:[{_LETTER}0-9](?:[{_LETTER}0-9-]{{0,61}}[{_LETTER}0-9])?\.)+"
    rf"(?:[Xx][Nn]--[A-Za-z0-9-]{{1,58}}[A-Za-z0-9]|[{_LETTER}]{{2,63}})"
)
_IN_URL = re.compile(r"://\S*\Z")

_CARD = re.compile(
    r"(?<![\w.])(?<!\d-)"
    r"(?:\d{14,19}|\d{4}([ \u00a0-])\d{4}\1\d{4}\1\d{4}(?:\1\d{3})?|\d{4}([ \u00a0-])\d{6}\2\d{4,5})"
    r"(?!\w|-\d|\.\d)"
)
_ISSUED = re.compile(
    r"4(?:\d{15}|\d{18})|5[1-5]\d{14}|2[2-7]\d{14}|3[47]\d{13}|3(?:0[0-5]|[689]\d)\d{11}"  # Visa to Diners Club
    r"|35\d{14,17}|6\d{15,18}|5[06-8]\d{14,17}"  # JCB, Discover and UnionPay, Maestro
)

_IP_V4 = re.compile(
    r"(?<![\w.~^+])(?<![A-Za-z]-)[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?!\w|\.\d|[-+~][A-Za-z0-9](?!\d{0,2}\.\d))"
)
_SHORTEST_IP_V4 = 10  # characters: 2.6.28.12 is a version; one address in a thousand is as short
_VERSION_BEFORE = re.compile(
    r"\b(?:v|ver|versions?|releases?|kernel|firmware|build|driver|rev|revision|(?:up|down)graded? to)\W{0,3}\Z", re.I
)
_IP_V6 = re.compile(r"(?<![\w:.])[23][0-9A-Fa-f]{3}(?::[0-9A-Fa-f]{0,4}){2,8}(?!\w)")

_OPENING = "([（［"
_FEWEST_PHONE_DIGITS = 8  # without a country code
# At least 7 digits with + and a country code, otherwise _FEWEST_PHONE_DIGITS.
_PHONE_DIGITS = re.compile(r"(?:[+＋][^\w\n]{0,4}\d|\d[^\w\n]{0,4}\d)(?:[^\w\n]{0,4}\d){6}")
_NO_PHONE = re.compile(r"\d+\.\d+|\d{4}[-–]\d{4}")
_SERIAL_BEFORE, _SERIAL_AFTER = re.compile(r"\w-\Z"), re.compile(r"-\w")
_PHONE_OF_COUNTRY = re.compile(r"[+＋][\s(]?[1-9](?:[\s()./-]{0,2}\d){6}")
_CODE_BEFORE = re.compile(
    r"(?:[#№/=_.@]|\b(?:order|invoice|ticket|tracking|bug|case|ref|reference|account|id|isbn|serial|item)"
    r"(?: (?:number|no\.?|id|is))*[\s:#]{1,3})\Z",
    re.I,
)


def _url_credentials(text: str, settings: Scrub, counts: Counter[str]) -> str:
    if "://" not in text:
        return text
    return _substitute(_CREDENTIALS, lambda match: ("", "@"), text, "url_credentials", counts)


def _emails(text: str, settings: Scrub, counts: Counter[str]) -> str:
    def path_of_url(match: re.Match[str]) -> tuple[str, str]:
        if not _IN_URL.search(text[max(0, match.start() - 256) : match.start()]):
            return "", ""
        local = match[0].partition("@")[0]
        return local[: 1 + max(map(local.rfind, "/?&"))], ""

    return _substitute(_EMAIL, path_of_url, text, "email", counts) if "@" in text else text


def _cards(text: str, settings: Scrub, counts: Counter[str]) -> str:
    def digits_after(match: re.Match[str]) -> tuple[str, str] | None:
        for end in (len(match[0]), 19):  # 4-4-4-4, then three digits that may be unrelated
            digits = "".join(str(int(digit)) for digit in match[0][:end] if digit.isdigit())
            if _ISSUED.fullmatch(digits) and _luhn(digits):
                return "", match[0][end:]
        return None

    return _substitute(_CARD, digits_after, text, "card", counts)


def _ips(text: str, settings: Scrub, counts: Counter[str]) -> str:
    def nothing_of_v4(match: re.Match[str]) -> tuple[str, str] | None:
        before = text[max(0, match.start() - 24) : match.start()]
        is_version = len(match[0]) < _SHORTEST_IP_V4 or _VERSION_BEFORE.search(before)
        return ("", "") if not is_version and _is_public(match[0]) else None

    def colon_after_v6(match: re.Match[str]) -> tuple[str, str] | None:
        end = len(match[0]) - (match[0].endswith(":") and not match[0].endswith("::"))  # the sentence's colon
        return ("", match[0][end:]) if _is_public(match[0][:end]) else None

    if "." in text:
        text = _substitute(_IP_V4, nothing_of_v4, text, "ip", counts)
    return _substitute(_IP_V6, colon_after_v6, text, "ip", counts) if ":" in text else text


def _phones(text: str, settings: Scrub, counts: Counter[str]) -> str:
    if settings.phone is None or not _PHONE_DIGITS.search(text):
        return text
    from phonenumbers import Leniency, PhoneNumberMatcher

    for region in settings.phone.regions or (None,):
        found = PhoneNumberMatcher(text, region, leniency=Leniency.STRICT_GROUPING)
        spans = [
            (match.start + _opens_before(match.raw_string), match.end)
            for match in found
            if _is_phone(text, match.start, match.raw_string)
        ]
        for start, end in reversed(spans):
            text = text[:start] + PLACEHOLDERS["phone"] + text[end:]
            counts["phone"] += 1
    return text


def _opens_before(number: str) -> bool:
    """Whether its first character is a bracket that closes after the number."""
    return number[0] in _OPENING and not any(closing in number for closing in ")]）］")


def _is_phone(text: str, start: int, number: str) -> bool:
    """False for a local number, a decimal, a range of years, part of a serial number, and a number without separators
    after words such as order, bug or #."""
    if number.lstrip(_OPENING)[0] in "+＋":
        return True
    if sum(map(str.isdigit, number)) < _FEWEST_PHONE_DIGITS or _NO_PHONE.fullmatch(number):
        return False
    before = text[max(0, start - 32) : start]
    if _SERIAL_BEFORE.search(before) or _SERIAL_AFTER.match(text, start + len(number)):
        return False
    return not (number.isdigit() and _CODE_BEFORE.search(before))


def _substitute(
    pattern: re.Pattern[str],
    kept: Callable[[re.Match[str]], tuple[str, str] | None],
    text: str,
    kind: str,
    counts: Counter[str],
) -> str:
    """Replace matches by the placeholder; `kept` returns the beginning and the end of the match to keep, or None to
    keep all of it."""

    def replacement(match: re.Match[str]) -> str:
        ends = kept(match)
        if ends is None:
            return match[0]
        counts[kind] += 1
        return PLACEHOLDERS[kind].join(ends)

    return pattern.sub(replacement, text)


def _luhn(digits: str) -> bool:
    """Whether the check digit is valid (Luhn; ISO/IEC 7812-1, annex B)."""
    doubled = (int(digit) * (1 + i % 2) for i, digit in enumerate(reversed(digits)))
    return sum(d - 9 * (d > 9) for d in doubled) % 10 == 0


@lru_cache(maxsize=4_096)
def _is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


_REPLACERS: dict[str, Callable[[str, Scrub, Counter[str]], str]] = {
    "url_credentials": _url_credentials,
    "email": _emails,
    "card": _cards,
    "ip": _ips,
    "phone": _phones,
}
