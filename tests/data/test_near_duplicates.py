"""Near-duplicates: what is left out is really like something kept, what is alike is found, whatever the tasks."""

from __future__ import annotations

import json
import random
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from datatrove.executor.local import LocalPipelineExecutor

from data.dialogue import read_dialogues
from data.near_duplicates import NearDuplicates, dropped_rows, minhash_stages
from data.prepare import main

WORDS = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("ala", "eno", "iru", "oba", "ume")]
SETTINGS = NearDuplicates(n_grams=3)


def texts_of(units: list[list[str]], unit: int) -> list[str]:
    return units[unit]


def perturbed(words: list[str], n_changes: int, rng: random.Random) -> list[str]:
    changed = list(words)
    for place in rng.sample(range(len(words)), n_changes):
        changed[place] = rng.choice(WORDS)
    return changed


def made_up(seed: int, n_originals: int = 25) -> list[list[str]]:
    """Three units of texts: originals, copies with other case and punctuation, light and heavy changes, short ones."""
    rng = random.Random(seed)
    texts = ["hi", "hi", "so what", ""]
    for _ in range(n_originals):
        words = rng.choices(WORDS, k=rng.randint(20, 60))
        texts.append(" ".join(words))
        texts.append(", ".join(words).upper() + "!")
        texts.append(" ".join(perturbed(words, 1, rng)))
        texts.append(" ".join(perturbed(words, len(words) // 2, rng)))
    rng.shuffle(texts)
    return [texts[0::3], texts[1::3], [], texts[2::3]]


def shingles(text: str) -> set[tuple[str, ...]]:
    words = text.lower().replace(",", " ").replace("!", " ").split()
    return {tuple(words[i : i + SETTINGS.n_grams]) for i in range(len(words) - SETTINGS.n_grams + 1)}


def similarity(one: str, other: str) -> float:
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b) if a | b else 0.0


def find(folder: Path, units: list[list[str]], tasks: int) -> list[list[int]]:
    for number, stage in enumerate(minhash_stages(folder, partial(texts_of, units), len(units), SETTINGS)):
        logs = folder / f"logs_{number}_{tasks}"
        LocalPipelineExecutor(stage.pipeline, tasks=stage.n_tasks or tasks, workers=1, logging_dir=str(logs)).run()
    return [rows.tolist() for rows in dropped_rows(folder, len(units))]


@pytest.mark.parametrize("seed", [1, 2])
def test_against_all_pairs(tmp_path: Path, seed: int) -> None:
    units = made_up(seed)
    dropped = find(tmp_path, units, 2)
    rows = [(unit, row) for unit, texts in enumerate(units) for row in range(len(texts))]
    gone = {(unit, row) for unit, found in enumerate(dropped) for row in found}
    text = {place: units[place[0]][place[1]] for place in rows}
    kept = [place for place in rows if place not in gone]
    for place in gone:
        assert max(similarity(text[place], text[other]) for other in kept if other < place) > 0.4
    pairs = [similarity(text[a], text[b]) for a, b in combinations(kept, 2)]
    assert max(pairs) < 0.97, "what is all but equal is found"
    assert sum(SETTINGS.chance(s) for s in pairs) < 12, "few that should have been found were not"
    assert len(gone) >= 35
    assert all(text[place] not in ("hi", "so what", "") for place in gone), "too short to be compared"


def test_any_number_of_tasks_and_a_second_run(tmp_path: Path) -> None:
    units = made_up(3)
    one = find(tmp_path / "1", units, 1)
    assert one == find(tmp_path / "2", units, 2) == find(tmp_path / "16", units, 16) == find(tmp_path / "1", units, 3)


def test_the_first_in_the_order_of_the_units_stays(tmp_path: Path) -> None:
    said = " ".join(WORDS[:30])
    assert find(tmp_path, [["something else entirely, said once"], [said, "no"], [said.upper(), said + " too"]], 2) == [
        [],
        [],
        [0, 1],
    ]


def test_the_threshold_is_where_the_chance_rises() -> None:
    settings = NearDuplicates()
    assert settings.threshold == pytest.approx(0.72, abs=0.005)
    assert settings.chance(0.5) < 0.06
    assert settings.chance(0.9) > 0.99


def test_data_prepare_leaves_them_out_of_both_sides(recipe_file: Path, tmp_path: Path) -> None:
    """No two dialogues that were found alike are left, so none is on both sides; every record is accounted for."""
    rng = random.Random(0)
    lines, copies = [], 0
    for i in range(120):
        words = [rng.choices(WORDS, k=12) for _ in range(4)]
        for copy in range(rng.choice([1, 1, 3])):
            copies += copy > 0
            said = [" ".join(perturbed(turn, 0 if copy == 0 or k else 1, rng)) for k, turn in enumerate(words)]
            messages = [{"speaker": "AB"[k % 2], "text": text, "time": k} for k, text in enumerate(said)]
            lines.append({"id": f"{i} {copy}", "messages": messages, "participants": [f"{i} {copy}"]})
    rng.shuffle(lines)
    path = tmp_path / "alike.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = [str(recipe_file), f"sources=[{{kind: chat_jsonl, path: {path}}}]", "unit_bytes=9000"]
    given.append("near_duplicates={n_grams: 3, buckets: 40, hashes_per_bucket: 4}")
    manifests = []
    for tasks in (1, 3):
        run_dir = tmp_path / f"run_{tasks}"
        assert main([*given, f"tasks={tasks}", f"run_dir={run_dir}"]) == 0
        manifests.append(json.loads((run_dir / "manifest.json").read_text()))
    assert manifests[0] == manifests[1]
    records = manifests[0]["records"]
    assert records["filtered"]["near-duplicate of an earlier dialogue"] + records["duplicates"] == copies
    assert records["read"] == records["kept"] + copies
    sides = [list(read_dialogues(tmp_path / "run_1" / "dialogues" / f"{side}.jsonl")) for side in ("train", "heldout")]
    said = [[" ".join(m.text for m in dialogue.messages) for dialogue in side] for side in sides]
    assert max(similarity(a, b) for a in said[0] for b in said[1]) < 0.5
    assert np.all([len(side) > 0 for side in sides])
