"""Which pairs a preference run trains on: those of all its files together, and what is said of the others."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from data.format.dialogue import Message
from data.format.encode import encode_prompt, encode_reply
from data.format.tokenizer import DialogueTokenizer
from data.sources.preferences import CONTRADICTED, REPEATED, PreferencePair, write_pairs
from eval.statistics import Bootstrap
from train.deepspeed.world import World
from train.dpo import FilePairs, _digest_of, _figures, collect_pairs
from train.loop import LoopError, Outcome
from train.preference.on_policy import OnPolicyPairs
from train.preference.pair_rows import CONTEXT_CUT, EncodedPair, PairRows, encode_pairs


def pair(context: str, chosen: str, rejected: str, *more: Message) -> PreferencePair:
    return PreferencePair("p", (Message("Ann", context), *more), "Ben", chosen, rejected, "test")


def collect(folder: Path, *files: list[PreferencePair]) -> tuple[list[PreferencePair], str]:
    """What the files give together, and what is printed."""
    sources = []
    for number, pairs in enumerate(files):
        write_pairs(folder / f"{number}.jsonl", pairs)
        sources.append(FilePairs(kind="file", path=str(folder / f"{number}.jsonl")))
    recipe, nothing, printed = SimpleNamespace(pairs=tuple(sources)), SimpleNamespace(), io.StringIO()
    given: Any = (recipe, nothing, nothing, World(0, 1, torch.device("cpu")), Console(file=printed))
    return collect_pairs(*given), printed.getvalue()


def test_repeated_and_contradicting_pairs_of_all_files_are_left_out_and_told(tmp_path: Path) -> None:
    first = [pair("a", "yes", "no"), pair("a", "yes ", "no"), pair("b", "yes", "no")]
    own = pair("d", "yes", "no", Message("Ben", "so"))
    second = [pair("b", "no", "yes"), pair("c", "no", "yes"), pair("a", "yes", "no"), own]
    found, printed = collect(tmp_path, first, second)
    assert found == [first[0], second[1], own]
    assert f"3 distinct pairs; left out of 7: 2 {CONTRADICTED}, 2 {REPEATED}; in 1 the character writes" in printed
    assert "distinct pairs\n" in collect(tmp_path, first[:1])[1]


def test_no_pair_but_contradicting_ones_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LoopError, match=r"^0 distinct pairs; left out of 2: 2 another pair.*nothing to train on"):
        collect(tmp_path, [pair("a", "yes", "no"), pair("a", "no", "yes")])


def test_a_context_that_is_cut_down_to_the_characters_own_message_is_left_out(data_dir: Path) -> None:
    tokenizer = DialogueTokenizer.load(data_dir)
    one = pair("the cat sat " * 9, "yes", "no", Message("Ben", "tea"))
    reply = max(len(encode_reply(tokenizer, text)) for text in ("yes", "no"))
    whole = len(encode_prompt(tokenizer, one.messages, "Ben")) + reply
    assert len(encode_pairs([one], tokenizer, whole)[0]) == 1
    assert encode_pairs([one], tokenizer, whole - 1) == ([], {CONTEXT_CUT: 1})


@pytest.mark.parametrize("long_side", ["chosen", "rejected"])
def test_both_replies_fit_beside_the_prompt(data_dir: Path, long_side: str) -> None:
    tokenizer, replies = DialogueTokenizer.load(data_dir), {"chosen": "yes", "rejected": "no"}
    replies[long_side] = "tea " * 12
    one = pair("the cat sat", replies["chosen"], replies["rejected"])
    longest = len(encode_prompt(tokenizer, one.messages, "Ben")) + len(encode_reply(tokenizer, replies[long_side]))
    ((encoded,), _) = encode_pairs([one], tokenizer, longest)
    assert len(encoded.prompt) + max(len(encoded.chosen), len(encoded.rejected)) == longest
    assert encode_pairs([one], tokenizer, longest - 1)[0] == []


@pytest.mark.parametrize("changed", ["init_from", "scorer", "data", "seed", "n_candidates", "precision"])
def test_sampled_pairs_are_known_by_all_that_they_depend_on(tmp_path: Path, changed: str) -> None:
    def digest(content: dict[str, str], seed: int = 1, n_candidates: int = 3, precision: str = "float32") -> str:
        for name, text in content.items():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "done.json").write_text(json.dumps({"content": text}))
        source = OnPolicyPairs(
            kind="on_policy", scorer=str(tmp_path / "scorer"), n_contexts=9, max_context_tokens=9, max_new_tokens=9,
            n_candidates=n_candidates,
        )  # fmt: skip
        recipe: Any = SimpleNamespace(
            init_from=str(tmp_path / "init_from"), data=str(tmp_path / "data"), seed=seed,
            engine=SimpleNamespace(precision=precision),
        )  # fmt: skip
        return _digest_of(source, recipe)

    content = {"init_from": "a", "scorer": "b", "data": "c"}
    first = digest(content)
    if changed in content:
        assert digest(content | {changed: "other"}) != first
    else:
        assert digest(content, **{changed: {"precision": "bfloat16"}.get(changed, 5)}) != first  # type: ignore[arg-type]
    assert digest(content) == first


def test_the_interval_of_the_accuracy_is_over_users() -> None:
    """Ten equal answers of a user are one observation."""
    users = [user for user in "abcd" for _ in range(10)]
    heldout = PairRows([EncodedPair([1], [2, 3], [4], user) for user in users])
    wins_N = np.array([float(user in "abc") for user in users])
    _, figures = _figures(Outcome(1, True, {}, 0), heldout, heldout, wins_N)
    low, high = figures["heldout_accuracy_interval"]
    expected = Bootstrap().mean(wins_N, users)
    assert (low, high) == (expected.low, expected.high)
    alone = Bootstrap().mean(wins_N)
    assert high - low > 1.5 * (alone.high - alone.low)


@pytest.mark.parametrize("chosen_is_longer", [True, False])
def test_length_alone_prefers_whichever_length_is_preferred_more(chosen_is_longer: bool) -> None:
    short, long = [4], [2, 3]
    sides = (long, short) if chosen_is_longer else (short, long)
    pairs = [EncodedPair([1], *sides, f"u{n}") for n in range(3)] + [EncodedPair([1], *reversed(sides), "u")]
    rows = PairRows(pairs)
    _, figures = _figures(Outcome(1, True, {}, 0), rows, rows, np.ones(4))
    assert figures["heldout_length_only_accuracy"] == 0.75
