"""What is held out is not trained on: after near-duplicates are removed and the dialogues are split, no participant and
no near-duplicate is on both sides."""

import random
from datetime import UTC, date, datetime
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.clean.near_duplicates import NearDuplicates, compared_text
from data.clean.split import HELDOUT, TRAIN, FractionSplit, SplitError, SplitRecords, TimeSplit, split
from data.format.dialogue import Dialogue, Message
from data.pipeline.minhash import minhash_stages, near_duplicates
from data.pipeline.record import participants_of, records_of
from data.pipeline.work_folder import WorkFolder

N_GRAMS = 3
ALIKE = 0.96  # found but for a chance of 1e-8
DAY = 86_400.0
BOUNDARY = date(2018, 9, 1)
MIDNIGHT = datetime(2018, 9, 1, tzinfo=UTC).timestamp()
RULES = [
    TimeSplit(kind="time", heldout_from=BOUNDARY),
    FractionSplit(kind="fraction", heldout=0.4),
]


@st.composite
def logs(draw: st.DrawFn) -> list[Dialogue]:
    """Dialogues of which some repeat others but for a few words, said by other people at other times."""
    generator = random.Random(draw(st.integers(0, 1 << 32)))
    words = [f"{a}{b}" for a, b in product("bdfgklmnprst", ["an", "el", "in", "or", "un"])]
    originals = [generator.choices(words, k=generator.randint(3, 150)) for _ in range(draw(st.integers(1, 8)))]
    dialogues = []
    for number in range(draw(st.integers(4, 30))):
        said = list(generator.choice(originals))
        for _ in range(draw(st.sampled_from([0, 1, 1, 30]))):
            said[generator.randrange(len(said))] = generator.choice(words)
        half = len(said) // 2
        time = MIDNIGHT + generator.uniform(-9, 9) * DAY
        messages = (Message("Ann", " ".join(said[:half]), time), Message("Bob", " ".join(said[half:]), time + DAY))
        people = draw(st.lists(st.integers(0, 40).map("p{}".format), max_size=2, unique=True))
        dialogues.append(Dialogue(f"d{number}", messages, "Bob", tuple(people)))
    return dialogues


def sides_of(dialogues: list[Dialogue], rule: TimeSplit | FractionSplit, folder: Path) -> dict[int, list[Dialogue]]:
    """Near-duplicates go, the rest is split."""
    units = [dialogues[::2], dialogues[1::2]]
    work = WorkFolder(folder)
    texts = [[compared_text(dialogue) for dialogue in unit] for unit in units]
    for stage in minhash_stages(work, texts.__getitem__, len(units), NearDuplicates(n_grams=N_GRAMS), 1):
        list(stage.pipeline[0].run())
    kept = [dialogue for dialogue, gone in zip([*units[0], *units[1]], near_duplicates(work), strict=True) if not gone]
    records = records_of(kept, [True] * len(kept), seed=0)
    split_records = SplitRecords(
        source=np.zeros(len(kept), np.int64),
        start_time=records["start_time"],
        end_time=records["end_time"],
        heldout_hash=records["heldout_hash"],
        n_participants=records["n_participants"],
        participants=participants_of(kept),
    )
    sides = split(split_records, rule)
    return {side: [d for d, found in zip(kept, sides, strict=True) if found == side] for side in (TRAIN, HELDOUT)}


def similarity(one: Dialogue, other: Dialogue) -> float:
    a, b = ({*zip(*(compared_text(d).split()[i:] for i in range(N_GRAMS)), strict=False)} for d in (one, other))
    return len(a & b) / len(a | b) if a | b else 0.0


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
@settings(max_examples=15)
@given(dialogues=logs())
def test_no_participant_and_no_near_duplicate_is_on_both_sides(
    dialogues: list[Dialogue], rule: TimeSplit | FractionSplit, tmp_path_factory: pytest.TempPathFactory
) -> None:
    try:
        sides = sides_of(dialogues, rule, tmp_path_factory.mktemp("work"))
    except SplitError:
        return  # a side is empty: everybody is linked, or all are of one season
    train, heldout = sides[TRAIN], sides[HELDOUT]
    assert {p for d in train for p in d.participants}.isdisjoint(p for d in heldout for p in d.participants)
    assert max(similarity(one, other) for one in train for other in heldout) < ALIKE
    if isinstance(rule, TimeSplit):
        times = [[message.time or 0 for d in side for message in d.messages] for side in (train, heldout)]
        assert max(times[0]) < MIDNIGHT <= min(times[1])


def test_the_property_can_fail(tmp_path: Path) -> None:
    """Without the removal of near-duplicates the same logs do leak."""
    text = " ".join(random.Random(0).choices([f"w{i}" for i in range(50)], k=300))
    dialogues = [
        Dialogue(str(i), (Message("Ann", text + f" no {i}", MIDNIGHT + (i - 3) * DAY),), "Ann", (f"p{i}",))
        for i in range(6)
    ]
    assert similarity(dialogues[0], dialogues[5]) > ALIKE
    with pytest.raises(SplitError):  # one of the six is left
        sides_of(dialogues, RULES[0], tmp_path)
