"""Near-duplicates: against Jaccard similarities counted out, whatever the tasks and the units, and after an
interruption."""

import random
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.clean.near_duplicates import NearDuplicates
from data.pipeline.executor import DataStage, LocalSettings
from data.pipeline.minhash import (
    CLUSTERS,
    SIGNATURES,
    DialogueSignature,
    UnicodeWords,
    minhash_config,
    minhash_stages,
    near_duplicates,
    repeated_rows,
)
from data.pipeline.work_folder import WorkFolder

Units = list[list[str]]
WORDS = [a + b + c for a in "bdgklmnprt" for b in "aeiou" for c in "dklmnrst"]


def shingles(text: str, n: int) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def similarity(one: str, other: str, n: int) -> float:
    a, b = shingles(one, n), shingles(other, n)
    return len(a & b) / len(a | b) if a | b else 0.0


def run(stages: Sequence[DataStage], order: Callable[[int], Sequence[int]] = range) -> None:
    for stage in stages:
        for rank in order(stage.n_tasks):
            for step in stage.pipeline:
                assert list(step.run(None, rank, stage.n_tasks)) == []


def dropped(units: Units, folder: Path, rule: NearDuplicates, n_tasks: int = 1) -> list[int]:
    """The places of the dropped rows when the rows of all units are numbered through."""
    work = WorkFolder(folder)
    run(minhash_stages(work, units.__getitem__, len(units), rule, n_tasks))
    return np.flatnonzero(near_duplicates(work)).tolist()


def cut(texts: list[str], sizes: list[int]) -> Units:
    edges = [0, *accumulate(sizes)]
    return [texts[first:end] for first, end in zip(edges, [*edges[1:], len(texts)], strict=True)]


def family(generator: random.Random, n_words: int, n_members: int, n_changes: int) -> list[str]:
    """A text, and texts that differ from the one before in some words."""
    words = generator.choices(WORDS, k=n_words)
    texts = [" ".join(words)]
    for _ in range(n_members - 1):
        for _ in range(n_changes if words else 0):
            words[generator.randrange(len(words))] = generator.choice(WORDS)
        texts.append(" ".join(words))
    return texts


@st.composite
def collections(draw: st.DrawFn) -> list[str]:
    seed = draw(st.integers(0, 1 << 32))
    families = draw(st.lists(st.tuples(st.integers(0, 80), st.integers(1, 5), st.integers(0, 12)), max_size=6))
    generator = random.Random(seed)
    texts = [text for sizes in families for text in family(generator, *sizes)]
    generator.shuffle(texts)
    return texts


@settings(max_examples=12)
@given(texts=collections(), sizes=st.lists(st.integers(0, 6), max_size=5), n_grams=st.sampled_from([2, 3, 5]))
def test_what_is_dropped_is_similar_to_what_is_kept_and_nothing_kept_repeats(
    texts: list[str], sizes: list[int], n_grams: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rule = NearDuplicates(n_grams=n_grams)
    units = cut(texts, sizes)
    gone = dropped(units, tmp_path_factory.mktemp("one"), rule)
    kept = [i for i in range(len(texts)) if i not in set(gone)]
    for i in gone:
        assert max(similarity(texts[i], texts[k], n_grams) for k in kept if k < i) > 0.3  # chance below: 1e-3
    for place, i in enumerate(kept):
        assert all(similarity(texts[i], texts[k], n_grams) < 0.96 for k in kept[:place])  # missed: 1e-8
    for n_tasks in (2, 16):
        assert dropped(units, tmp_path_factory.mktemp("tasks"), rule, n_tasks) == gone
    assert dropped([texts], tmp_path_factory.mktemp("together"), rule) == gone


@given(members=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 9)), max_size=40, unique=True))
def test_rows_are_dropped_one_after_the_other(members: list[tuple[int, int]]) -> None:
    claimed: set[int] = set()
    expected = []
    for row in sorted({row for row, _ in members}):
        groups = {group for other, group in members if other == row}
        if groups & claimed:
            expected.append(row)
        else:
            claimed |= groups
    pairs = np.array(members, np.int64).reshape(-1, 2)
    assert repeated_rows(pairs[:, 0], pairs[:, 1]) == expected


def test_pairs_are_found_with_the_chance_that_is_told(tmp_path: Path) -> None:
    generator = random.Random(0)
    for n_changes in (2, 7):
        families = [family(generator, 60, 2, n_changes) for _ in range(500)]
        rule = NearDuplicates(n_grams=3)
        expected = sum(rule.chance(similarity(*texts, 3)) for texts in families)
        found = len(dropped([[text for texts in families for text in texts]], tmp_path / str(n_changes), rule))
        assert abs(found - expected) < 4 * (500 * 0.25) ** 0.5 * 0.8, n_changes


def test_processes_give_the_same(tmp_path: Path) -> None:
    generator = random.Random(1)
    texts = [text for _ in range(40) for text in family(generator, 40, 3, 2)]
    units, rule = cut(texts, [10, 0, 30, 50]), NearDuplicates(n_grams=3, buckets=6)
    alone = dropped(units, tmp_path / "alone", rule)
    assert 20 < len(alone) < 80
    work = WorkFolder(tmp_path / "processes")
    work.path.mkdir(parents=True)
    with LocalSettings(kind="local", workers=2).open() as run_stage:
        for stage in minhash_stages(work, units.__getitem__, len(units), rule, 16):
            run_stage(stage, work.logs(stage.name, stage.n_tasks))
    assert np.flatnonzero(near_duplicates(work)).tolist() == alone


def test_a_chain_keeps_what_is_unlike_its_first(tmp_path: Path) -> None:
    texts = family(random.Random(2), 100, 30, 2)
    assert similarity(texts[0], texts[-1], 3) < 0.1
    gone = set(dropped([texts], tmp_path, NearDuplicates(n_grams=3)))
    kept = [i for i in range(30) if i not in gone]
    assert kept[0] == 0 and 2 < len(kept) < 20
    for i in gone:
        assert max(similarity(texts[i], texts[k], 3) for k in kept if k < i) > 0.4


def test_case_punctuation_accents_and_numbers_make_no_difference(tmp_path: Path) -> None:
    texts = ["How ARE you today, Zoë? I am 42!", "how are you today zoe i am 7", "how are you today, zoe? I was 42!"]
    assert dropped([texts], tmp_path, NearDuplicates(n_grams=3, hashes_per_bucket=30)) == [1]


def test_short_dialogues_are_not_compared(tmp_path: Path) -> None:
    assert dropped([["hello", "hello", "", "hi you", "hi you"]], tmp_path, NearDuplicates(n_grams=3)) == []


def test_scripts_without_spaces_have_words(tmp_path: Path) -> None:
    text = "今天天气很好我们一起去公园散步吧然后在湖边喝茶聊天直到太阳下山再慢慢走回家"
    texts = [text, text.replace("喝茶", "喝水"), "完全不同的一句话里面没有任何相同的内容只是为了比较而已谢谢大家"]
    assert dropped([texts], tmp_path, NearDuplicates(n_grams=2)) == [1]
    assert UnicodeWords().word_tokenize("我们 go 👍🏽 สวัสดี") == ["我", "们", "go", "👍🏽", *"สวัสดี"]


def test_the_seed_is_in_the_signatures(tmp_path: Path) -> None:
    text = "a text of some words to be signed by both"
    one, same, other = (DialogueSignature(tmp_path, minhash_config(NearDuplicates(seed=seed))) for seed in (1, 1, 2))
    signature = one.get_signature(one.get_shingles(text))
    assert [len(bucket) for bucket in signature] == [8] * 14
    assert same.get_signature(same.get_shingles(text)) == signature
    assert other.get_signature(other.get_shingles(text)) != signature


def test_signatures_are_datatroves_own(tmp_path: Path) -> None:
    """Of the same shingles, our blocks of array operations give what datatrove's one product gives."""
    step = DialogueSignature(tmp_path, minhash_config(NearDuplicates(n_grams=2)))
    shingle_hashes = step.get_shingles(" ".join(random.Random(3).choices(WORDS, k=1_000)))
    assert step.get_signature(shingle_hashes) == super(DialogueSignature, step).get_signature(shingle_hashes)


def test_finished_items_are_not_done_again(tmp_path: Path) -> None:
    texts = family(random.Random(4), 40, 6, 1)
    units, rule, work = cut(texts, [2, 2]), NearDuplicates(n_grams=3), WorkFolder(tmp_path)
    asked: list[int] = []

    def texts_of_unit(unit: int) -> list[str]:
        asked.append(unit)
        return units[unit]

    stages = minhash_stages(work, texts_of_unit, len(units), rule, 3)
    list(stages[0].pipeline[0].run(None, 1, 3))
    run(stages, lambda n: range(n - 1, -1, -1))
    first = np.flatnonzero(near_duplicates(work)).tolist()
    work.item(CLUSTERS, 0).rename(tmp_path / "gone")
    run(stages)
    assert np.flatnonzero(near_duplicates(work)).tolist() == first
    assert sorted(asked) == [0, 1, 2]
    assert work.n_done(SIGNATURES) == 3
