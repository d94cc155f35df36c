"""The entry point: outputs, idempotence, independence of tasks and shard size, the order of keeping, errors in one
line."""

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from data.format.dialogue_json import read_dialogues
from data.format.encode import encode_dialogue
from data.format.tokenizer import DialogueTokenizer
from data.packed.shards import PackedDataset
from data.pipeline.recipe import DataRecipe
from data.prepare import main
from recipes.loader import dump_recipe, load_recipe

WORDS = tuple("hello you how are doing today fine thanks what nap good yes no why me".split())  # noqa: SIM905
ROLES = ("user", "assistant")
Contents = Callable[[Path], dict[str, bytes]]
WriteChats = Callable[..., None]


def test_outputs(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], contents: Contents) -> None:
    assert main([str(recipe_file)]) == 0
    run_dir = tmp_path / "run"
    tokenizer = DialogueTokenizer.load(run_dir)
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert manifest["records"]["read"] == manifest["records"]["kept"] == 40
    people: list[set[str]] = []
    for side in ("train", "heldout"):
        dataset = PackedDataset(run_dir / side)
        dialogues = list(read_dialogues(run_dir / "dialogues" / f"{side}.jsonl"))
        people.append({p for d in dialogues for p in d.participants})
        encoded = [encode_dialogue(tokenizer, d, 10) for d in dialogues]
        assert dataset.vocab_size == tokenizer.vocab_size == 305
        answers = sum(int(dataset.row(i).loss_mask_L.sum()) for i in range(len(dataset)))
        assert answers == sum(int(e.loss_mask.sum()) for e in encoded) == manifest[side]["n_answer_tokens"]
        labels = [manifest[side]["n_partner_leaves"], manifest[side]["n_partner_continues"]]
        assert labels == [sum(int((e.label == k).sum()) for e in encoded) for k in (0, 1)]
        assert manifest[side]["fingerprint"] == dataset.fingerprint
    assert people[0].isdisjoint(people[1])
    done = json.loads((run_dir / "done.json").read_text())
    assert "tokens, density" in done["key_figure"]
    assert done["figures"]["fingerprint"] == manifest["train"]["fingerprint"]
    assert "40" in capsys.readouterr().out
    before = contents(run_dir)
    assert main([str(recipe_file)]) == 0
    assert "is finished: " in capsys.readouterr().out
    assert contents(run_dir) == before


def several_sources(tmp_path: Path, write_chats: WriteChats) -> str:
    """Two folders and a file, as an override: with a bad line, records left out by a filter, and duplicates."""
    for folder, n_files in (("a", 3), ("b", 2)):
        (tmp_path / folder).mkdir()
        for number in range(n_files):
            write_chats(tmp_path / folder / f"{number}.jsonl", 60 + 40 * number)
    with open(tmp_path / "b" / "1.jsonl", "a", encoding="utf-8") as file:
        file.write('{broken\n{"id": "alone", "messages": [{"speaker": "Ann", "text": "hello?"}]}\n')
    kind = "kind: chat_jsonl, path"
    return f"sources=[{{{kind}: {tmp_path}/a}}, {{{kind}: {tmp_path}/b}}, {{{kind}: {tmp_path}/chats.jsonl}}]"


def test_tasks_workers_and_order_of_work_do_not_change_a_byte(
    recipe_file: Path, tmp_path: Path, contents: Contents, write_chats: WriteChats
) -> None:
    given = [str(recipe_file), several_sources(tmp_path, write_chats), "max_bad_fraction=0.1", "unit_bytes=5000"]
    given += ["pack_tokens=2000"]
    assert main([*given, f"run_dir={tmp_path}/one"]) == 0
    one = contents(tmp_path / "one")
    manifest = json.loads(one["manifest.json"])
    assert manifest["records"]["quarantined"] == 1
    assert manifest["records"]["duplicates"] > 100
    for tasks, workers in ((1, 2), (2, 1), (16, 2)):
        run_dir = tmp_path / f"{tasks}_{workers}"
        executor = f"executor={{kind: local, workers: {workers}}}"
        assert main([*given, f"run_dir={run_dir}", executor, f"tasks={tasks}"]) == 0
        assert contents(run_dir) == one


def test_the_size_of_units_and_shards_does_not_change_the_fingerprint(
    recipe_file: Path, tmp_path: Path, write_chats: WriteChats
) -> None:
    write_chats(tmp_path / "chats.jsonl", 300)
    given = [str(recipe_file), "pack_tokens=2000"]
    assert main(given) == 0
    assert main([*given, f"run_dir={tmp_path}/other", "unit_bytes=3000", "rows_per_shard=1000"]) == 0
    for side in ("train", "heldout"):
        ours, other = PackedDataset(tmp_path / "run" / side), PackedDataset(tmp_path / "other" / side)
        assert ours.fingerprint == other.fingerprint
        assert [ours.row(i).tokens_L.tolist() for i in range(len(ours))] == [
            other.row(i).tokens_L.tolist() for i in range(len(other))
        ]


def test_personal_data_is_scrubbed_and_counted(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], write_chats: WriteChats
) -> None:
    chats = tmp_path / "chats.jsonl"
    write_chats(chats, 60)
    chats.write_text(chats.read_text().replace("hello", "ann@example.org"))
    found = chats.read_text().count("ann@example.org")
    with open(chats, "a") as file:
        file.write('{"id": "ann@example.org", "text": "ann@example.org"}\n')
    rule = ["max_bad_fraction=0.1", 'scrub={ids: {salt: "a secret"}}']
    assert main([str(recipe_file), *rule]) == 0
    records = json.loads((tmp_path / "run" / "manifest.json").read_text())["records"]
    assert records["scrubbed"] == {"email": found, "id": 60}
    assert "ann" not in (tmp_path / "run" / "quarantine.jsonl").read_text()
    texts = "".join((tmp_path / "run" / "dialogues" / f"{side}.jsonl").read_text() for side in ("train", "heldout"))
    assert texts.count("[email]") == found and "@" not in texts and '"u3"' not in texts
    assert f"{found} email" in capsys.readouterr().out


def test_of_duplicates_the_first_stays(recipe_file: Path, tmp_path: Path, write_chats: WriteChats) -> None:
    sources = several_sources(tmp_path, write_chats)
    assert main([str(recipe_file), sources, "max_bad_fraction=0.1", "unit_bytes=5000"]) == 0
    kept = Counter(
        dialogue.source
        for side in ("train", "heldout")
        for dialogue in read_dialogues(tmp_path / "run" / "dialogues" / f"{side}.jsonl")
    )
    assert kept == {"chat_jsonl": 140}, "the longest file of the first folder holds what all others hold"


def test_different_dialogues_of_one_id_are_told(
    recipe_file: Path, tmp_path: Path, write_chats: WriteChats, capsys: pytest.CaptureFixture[str]
) -> None:
    """A record that is there twice is a duplicate, and no second piece."""
    chats = tmp_path / "chats.jsonl"
    write_chats(chats, 60)
    lines = chats.read_text().splitlines()
    piece = json.loads(lines[0])
    piece["messages"].append({"speaker": "Ann", "text": "and then?", "time": 99})
    for given, told in (([*lines, lines[5]], False), ([*lines, json.dumps(piece)], True)):
        chats.write_text("\n".join(given))
        assert main([str(recipe_file), f"run_dir={tmp_path}/{told}"]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert ("1 dialogue has the id of another one, such as 'chat 0' (2 dialogues)" in out) == told


def test_people_of_a_filtered_heldout_session_do_not_train(recipe_file: Path, tmp_path: Path) -> None:
    with open(tmp_path / "chats.jsonl", "w", encoding="utf-8") as file:
        for i, (time, people, n) in enumerate([(1e9, ["a"], 4), (1e9, ["b"], 4), (2e9, ["b"], 1), (2e9, ["c"], 4)]):
            said = [{"speaker": WORDS[k % 2], "text": f"{WORDS[i]} {' '.join(WORDS)}", "time": time} for k in range(n)]
            file.write(json.dumps({"id": str(i), "messages": said, "participants": people}) + "\n")
    assert main([str(recipe_file), "split={kind: time, heldout_from: 2018-09-01}", "tokenizer.vocab_size=290"]) == 0
    sides = {side: read_dialogues(tmp_path / "run" / "dialogues" / f"{side}.jsonl") for side in ("train", "heldout")}
    assert {side: [d.id for d in dialogues] for side, dialogues in sides.items()} == {"train": ["0"], "heldout": ["3"]}


def test_damage_is_repaired_by_running_again(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], contents: Contents
) -> None:
    assert main([str(recipe_file)]) == 0
    before = contents(tmp_path / "run")
    shard = tmp_path / "run" / "train" / "shard_00000.tokens.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    assert main([str(recipe_file)]) == 0
    assert "damaged" in capsys.readouterr().out
    assert contents(tmp_path / "run") == before


def test_data_of_an_older_format_are_not_taken_for_damaged(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], contents: Contents
) -> None:
    assert main([str(recipe_file)]) == 0
    path = tmp_path / "run" / "train" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": "dramatis-packed-1"}))
    done = tmp_path / "run" / "done.json"
    done.write_text(json.dumps(json.loads(done.read_text()) | {"outputs": {}}))  # that version wrote none
    before = contents(tmp_path / "run")
    assert main([str(recipe_file)]) == 2
    printed = capsys.readouterr()
    assert "has another format than this version" in printed.err
    assert "set another run_dir, or remove" in printed.err
    assert "damaged" not in printed.out and contents(tmp_path / "run") == before
    assert (tmp_path / "run" / "done.json").exists()
    path.write_text("[]")
    assert main([str(recipe_file)]) == 0
    assert "damaged" in capsys.readouterr().out


def test_openings_that_cut_dialogues_do_not_repeat_are_told(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(tmp_path / "chats.jsonl", "a", encoding="utf-8") as file:
        for number, (n_scene, n_said) in enumerate([(90, 20), (90, 20), (2, 20), (20, 1)]):
            said = [{"speaker": "narrator", "text": f"no {number} {'nap ' * n_scene}"}]
            said += [{"speaker": WORDS[k % 2], "text": f"{number} {' '.join(WORDS[:6])}"} for k in range(n_said)]
            file.write(json.dumps({"id": f"s{number}", "messages": said}) + "\n")
    assert main([str(recipe_file)]) == 0
    assert "2 dialogues are split and begin with a narrator's opening longer than half a row" in " ".join(
        capsys.readouterr().out.split()
    )
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert sum(manifest[side]["n_openings_not_repeated"] for side in ("train", "heldout")) == 2


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("sources.0.path=nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("tokenizer.vocab_size=9000", "support at most"),
        ("tokenizer={kind: file, path: nowhere}", "nowhere"),
        ("filters.min_messages=99", "no training dialogue remains of 40 records (40 fewer than 99 messages)"),
        ("split={kind: time, heldout_from: 2030-01-01}", "none is held-out"),
        ("executor={kind: slurm, workers: 2, partition: cpu, time: '1:00:00'}", "needs sbatch, which is not on PATH"),
    ],
)
def test_user_errors_are_one_line_and_leave_the_directory_usable(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, reason: str
) -> None:
    assert main([str(recipe_file), override]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert len(error.strip().splitlines()) == 1
    assert main([str(recipe_file)]) == 0


def test_bad_records_beyond_the_limit(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(tmp_path / "chats.jsonl", "a", encoding="utf-8") as file:
        file.write("{broken\n")
    assert main([str(recipe_file)]) == 2
    error = capsys.readouterr().err
    assert "1 of 41 records" in error
    assert "chats.jsonl:41: not JSON" in error
    assert (tmp_path / "run.quarantine.jsonl").exists()
    assert main([str(recipe_file), "max_bad_fraction=0.1"]) == 0
    assert len((tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()) == 1


def test_several_sources(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], write_chats: WriteChats
) -> None:
    """The same ids in both, a duplicate across them, a bad record in one: each source accounts for its own."""
    write_chats(tmp_path / "chats.jsonl", 60)
    roles = [{"role": role, "content": f"{role} {i % 29} {WORDS[i % 15]}"} for i in range(30) for role in ROLES]
    lines = [{"id": f"chat {i}", "messages": roles[2 * i : 2 * i + 2]} for i in range(30)]
    (tmp_path / "roles.jsonl").write_text("\n".join(json.dumps(line) for line in [*lines, lines[3], {"messages": 3}]))
    roles_source = f"{{kind: openai_messages, path: {tmp_path}/roles.jsonl}}"
    chats_source = f"{{kind: chat_jsonl, path: {tmp_path}/chats.jsonl}}"
    sources = f"sources=[{chats_source}, {roles_source}]"
    assert main([str(recipe_file), sources]) == 2
    assert "source openai_messages: 1 of 32 records are bad" in capsys.readouterr().err
    assert main([str(recipe_file), sources, "max_bad_fraction=0.04"]) == 0
    assert "openai_messages" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    records = manifest["sources"]
    assert [records[name]["read"] for name in ("chat_jsonl", "openai_messages")] == [60, 32]
    assert (records["openai_messages"]["quarantined"], records["openai_messages"]["duplicates"]) == (1, 1)
    for key in ("read", "quarantined", "duplicates", "kept"):
        assert manifest["records"][key] == sum(ledger[key] for ledger in records.values())
    for side in ("train", "heldout"):
        dialogues = list(read_dialogues(tmp_path / "run" / "dialogues" / f"{side}.jsonl"))
        assert all(dialogue.id.startswith(f"{dialogue.source}/chat ") for dialogue in dialogues)
        counted = {name: held["n_dialogues"] for name, held in manifest[side]["sources"].items()}
        assert counted == Counter(dialogue.source for dialogue in dialogues)
        assert set(counted) == set(records)
        assert sum(held["n_tokens"] for held in manifest[side]["sources"].values()) == manifest[side]["n_tokens"]


def test_dry_run_writes_nothing(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(recipe_file), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "40 records in 1 file(s)" in out
    assert "row_length: 64" in out
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_can_be_taken_over(recipe_file: Path, tmp_path: Path, contents: Contents) -> None:
    assert main([str(recipe_file)]) == 0
    taken = f"tokenizer={{kind: file, path: {tmp_path}/run}}"
    assert main([str(recipe_file), f"run_dir={tmp_path}/second", taken]) == 0
    assert contents(tmp_path / "second") == contents(tmp_path / "run")


def test_the_recipe_dumps_equal(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(DataRecipe, recipe_file)
    (tmp_path / "dumped.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(DataRecipe, tmp_path / "dumped.yaml") == recipe


def test_interruptions_at_random_lose_and_change_nothing() -> None:
    program = [sys.executable, str(Path(__file__).with_name("kill_prepare_at_random.py")), "--interruptions", "4"]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "4 interruptions" in ended.stdout.splitlines()[-1]


@pytest.mark.parametrize("ends", [True, False])
def test_no_label_without_evidence(recipe_file: Path, tmp_path: Path, ends: bool) -> None:
    source = f"[{{kind: chat_jsonl, path: {tmp_path}/chats.jsonl, ends_when_partner_leaves: {str(ends).lower()}}}]"
    assert main([str(recipe_file), f"sources={source}"]) == 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["train"]["n_partner_leaves"] > 0) == ends
    assert manifest["train"]["n_partner_continues"] > 0


def test_a_time_limit_without_times_is_an_error(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text(re.sub(r', "time": \d+', "", chats.read_text()))
    assert main([str(recipe_file)]) == 2
    assert "continue_within_seconds: 10 has no effect: none of the" in " ".join(capsys.readouterr().err.split())
    assert main([str(recipe_file), "continue_within_seconds=null"]) == 0
