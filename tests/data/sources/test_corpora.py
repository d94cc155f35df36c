"""The published corpora themselves give the counts they are known by."""

from collections import Counter

import pytest

from data.format.dialogue import NARRATOR, Dialogue
from data.sources.preferences import OTHER_CONTEXT, SAME_REPLY, SAYS_NOTHING, read_pair_file
from data.sources.record import LeftOut, Rejected
from data.sources.registry import SOURCES
from tests.corpora import CORPORA, needs_corpora

pytestmark = needs_corpora

# kind: dialogues, messages of people, records left out, bad records.
COUNTS = {
    "self_dialogue": (24_186, 374_124, 63, 0),
    "topical_chat": (1_078, 23_373, 0, 0),  # the two validation files
    "synthetic_persona_chat": (1_965, 54_307, 0, 3),  # of 1,968
    "casino": (1_030, 14_297, 0, 0),
    "star": (6_205, 108_137, 447, 0),  # of 6,652, in 447 of which nobody speaks
    "irc_ubuntu": (10_147, 66_978, 155_154, 0),  # of 222,132 messages, those in no conversation one by one
    "qmsum": (232, 129_177, 0, 0),
    "shakespeare": (290, 14_135, 2, 1),  # SOURCE.md is no play; a prologue of nobody; eight plays, and tinyshakespeare
    "hh_rlhf": (5_042, 23_393, 0, 0),
}


@pytest.mark.parametrize("kind", COUNTS)
def test_counts(kind: str) -> None:
    records = list(SOURCES[kind].model_validate({"kind": kind, "path": str(CORPORA / kind)}).read())
    dialogues = [record for record in records if isinstance(record, Dialogue)]
    types = Counter(type(record) for record in records)
    said = sum(message.speaker != NARRATOR for dialogue in dialogues for message in dialogue.messages)
    assert (types[Dialogue], said, types[LeftOut], types[Rejected]) == COUNTS[kind]
    assert len({dialogue.id for dialogue in dialogues}) == len(dialogues)


def test_everybody_of_the_meetings_keeps_a_name() -> None:
    meetings = SOURCES["qmsum"].model_validate({"kind": "qmsum", "path": str(CORPORA / "qmsum")}).read()
    dialogues = [record for record in meetings if isinstance(record, Dialogue)]
    assert len({message.speaker for dialogue in dialogues for message in dialogue.messages} - {NARRATOR}) == 523


def test_unusable_preference_pairs() -> None:
    paths = sorted((CORPORA / "hh_rlhf").glob("*.jsonl.gz"))
    read = [read_pair_file(path, "hh_rlhf", max_refused_fraction=0.02) for path in paths]
    refused = sum((file.refused for file in read), Counter())
    assert sum(file.n_records for file in read) == 5_042
    assert refused == {SAME_REPLY: 34, OTHER_CONTEXT: 5, SAYS_NOTHING: 5}
