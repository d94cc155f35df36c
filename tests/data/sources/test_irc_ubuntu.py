"""Reply links take a channel apart into conversations; clocks of 12 and 24 hours, actions, and broken links."""

from pathlib import Path

import pytest

from data.format.dialogue import Dialogue, check_times
from data.sources.irc_ubuntu import IrcUbuntuSource
from data.sources.record import LeftOut, Rejected, SourceError

LOG = """\
=== ann [n=ann@example.org] has joined #ubuntu
[23:58] <ann> my sound is gone
[23:58] <bob> who likes tea?
[23:59] <cat> ann: which card?
[23:59]  * bob waves
[00:01] <ann> cat: a blaster\x85 card
[00:02] <dan> nobody links to this
[00:03] <cat> try alsamixer
=== ann has left #ubuntu
"""
LINKS = "0 0 -\n1 1 -\n1 3 -\n2 2 -\n2 4 -\n3 5 -\n5 7 -\n8 8 -\n"


def read(folder: Path, log: str = LOG, links: str = LINKS) -> list[Dialogue | Rejected]:
    return [record for record in read_all(folder, log, links) if isinstance(record, Dialogue | Rejected)]


def read_all(folder: Path, log: str = LOG, links: str = LINKS) -> list[Dialogue | LeftOut | Rejected]:
    (folder / "2005-07-06.train-a.ascii.txt").write_text(log)
    (folder / "2005-07-06.train-a.annotation.txt").write_text(links)
    return list(IrcUbuntuSource(kind="irc_ubuntu", path=str(folder)).read())


def test_conversations_are_taken_apart(tmp_path: Path) -> None:
    sound, tea = read(tmp_path)
    assert isinstance(sound, Dialogue)
    assert isinstance(tea, Dialogue)
    assert [(message.speaker, message.text) for message in sound.messages] == [
        ("ann", "my sound is gone"),
        ("cat", "ann: which card?"),
        ("ann", "cat: a blaster\x85 card"),
        ("cat", "try alsamixer"),
    ]
    midnight = 1120694400.0  # 2005-07-07T00:00:00Z
    assert [message.time - midnight for message in sound.messages] == [-120, -60, 60, 180]
    assert [message.text for message in tea.messages] == ["who likes tea?", "/me waves"]
    assert (sound.id, tea.id) == ("2005-07-06.train-a:2", "2005-07-06.train-a:3")
    assert (sound.character, tea.character) == ("cat", "bob"), "who helps; who is alone"
    assert len(sound.participants) == 2
    assert not {"ann", "cat"} & set(sound.participants)


def test_a_clock_of_twelve_hours_goes_on(tmp_path: Path) -> None:
    log = "".join(f"[{clock}] <{'ab'[i % 2]}> hi {i}\n" for i, clock in enumerate(["11:59", "12:30", "01:10", "01:05"]))
    (_, disordered) = read(tmp_path, log, "0 1 -\n2 3 -\n")
    assert isinstance(disordered, Rejected), "five minutes back are not half a day on"
    (dialogue,) = read(tmp_path, log, "0 1 -\n1 2 -\n")
    assert isinstance(dialogue, Dialogue)
    check_times(dialogue.messages)
    start, *_, end = (message.time or 0 for message in dialogue.messages)
    assert end - start == 71 * 60


@pytest.mark.parametrize("link", ["1 x -", "1 99 -", "3 1", "-1 3 -"])
def test_broken_links_are_rejected_with_their_line(tmp_path: Path, link: str) -> None:
    bad, *good = read(tmp_path, links=f"2 4 -\n{link}\n")
    assert isinstance(bad, Rejected)
    assert (bad.file, bad.line) == (str(tmp_path / "2005-07-06.train-a.annotation.txt"), 2)
    assert len(good) == 1


def test_a_log_without_links_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "2005-07-06.ascii.txt").write_text(LOG)
    with pytest.raises(SourceError, match=r"2005-07-06\.ascii\.txt: alone"):
        list(IrcUbuntuSource(kind="irc_ubuntu", path=str(tmp_path)).read())
    (tmp_path / "2005-07-06.ascii.txt").rename(tmp_path / "monday.ascii.txt")
    (tmp_path / "monday.annotation.txt").write_text(LINKS)
    with pytest.raises(SourceError, match="begins with a date"):
        list(IrcUbuntuSource(kind="irc_ubuntu", path=str(tmp_path)).read())


def test_every_line_that_somebody_writes_is_counted(tmp_path: Path) -> None:
    records = read_all(tmp_path, LOG + "garbage\n\n")
    left_out = [record for record in records if isinstance(record, LeftOut)]
    assert left_out == [LeftOut("a line without reply links")], "dan's"
    (bad,) = [record for record in records if isinstance(record, Rejected)]
    assert (bad.line, bad.record) == (10, "garbage")


@pytest.mark.parametrize("line", ["[00:02] <d:n> a colon", "dan: hi", "\x00", ""])
def test_a_conversation_with_a_line_that_nobody_can_write_is_rejected(tmp_path: Path, line: str) -> None:
    log = LOG.replace("[00:02] <dan> nobody links to this", line)
    bad, good = read(tmp_path, log, LINKS + "5 6 -\n")
    assert isinstance(bad, Rejected)
    assert (bad.line, bad.reason[:7]) == (2, "line 7:")
    assert isinstance(good, Dialogue)


def test_a_log_is_read_with_its_links_whichever_is_asked_for(tmp_path: Path) -> None:
    whole = read_all(tmp_path)
    source = IrcUbuntuSource(kind="irc_ubuntu", path=str(tmp_path))
    links, log = source.files()
    assert links.name.endswith(".annotation.txt")
    assert list(source.read_file(links)) == []
    assert list(source.read_file(log)) == whole
