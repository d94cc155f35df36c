"""What a stage needs of another is told by the pipeline's dry run, and again before anything is trained."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
from rich.console import Console

from model.config import ModelConfig
from model.transformer import Transformer
from model.weights import save_model
from recipes.loader import RecipeError, load_recipe
from recipes.pipeline import main, plan
from recipes.plan_check import PlanCheck, check_alone

ROOT = Path(__file__).parents[2]
SIZES = ["data.tokenizer.vocab_size=300", "pretrain.model.vocab_size=300", "data.executor.workers=1"]


def write_logs(folder: Path, n: int) -> None:
    folder.mkdir()
    lines = []
    for number in range(n):
        turns = [(i, s) for i in range(4) for s in ("Tom", "Mia")]
        said = [{"speaker": s, "text": f"{s} says {i} of {number}", "time": 60 * i} for i, s in turns]
        lines.append(json.dumps({"id": f"c{number}", "character": "Mia", "messages": said}))
    (folder / "a.jsonl").write_text("\n".join(lines))


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The demo's pipeline on 60 own conversations, of which some are held out."""
    write_logs(tmp_path / "logs", 60)
    monkeypatch.setenv("COLUMNS", "200")
    sources = f"data.sources=[{{kind: chat_jsonl, path: {tmp_path}/logs}}]"
    return [
        str(ROOT / "recipes" / "demo"), "--runs", str(tmp_path / "runs"), sources,
        "data.split={kind: fraction, heldout: 0.2, by_participant: false}", *SIZES,
    ]  # fmt: skip


def dry_run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main([*arguments, "--dry-run"])
    captured = capfd.readouterr()
    return code, captured.out + captured.err


def test_counts_that_can_be_lowered_are_noted(logs: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    code, output = dry_run(capfd, *logs)
    assert code == 0, output
    n = int(output.split("eval: replies.n_contexts: 128 asked for, ")[1].split()[0])
    assert 2 <= n <= 20
    assert f"ranking.n_contexts: 320 asked for, {n} contexts found held out; {n} are used" in output
    assert f"export: n_parity_conversations: 24 asked for, {n} held-out dialogues found" in output
    assert not Path(logs[2]).exists()
    code, output = dry_run(capfd, *logs, "eval.ranking.n_distractors=40")
    assert f"ranking.n_distractors: 40 asked for, {n - 1} other replies found held out" in output


def test_one_dry_run_tells_everything(logs: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Bad records, a vocabulary of neither the data nor the model, bad recipes, bad pairs and what would be lowered."""
    with (tmp_path / "logs" / "a.jsonl").open("a") as file:
        file.write("\n{}\nnot JSON\n")
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    pairs = ", ".join(f"{{kind: file, path: {tmp_path}/{name}.jsonl}}" for name in ("one", "two"))
    code, output = dry_run(
        capfd, *logs, "data.tokenizer.vocab_size=4096", "sft.loop.max_step=3", f"dpo.pairs=[{pairs}]",
        "pretrain.model.kv_sharing={kind: adjacent, group: 2}", "eval.ranking.n_distractors=40",
    )  # fmt: skip
    assert code == 2
    for told in (
        "2 of 62 records are bad", "these texts support at most 305 pieces", "set model.vocab_size to 4096",
        "max_step: unknown key", "one.jsonl", "two.jsonl",
        "ranking.n_distractors: 40 asked for", "n_parity_conversations: 24 asked for",
        "cannot be exported",
    ):  # fmt: skip
        assert told in output, f"{told}\n{output}"


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["pretrain.model.vocab_size=512"], ["vocab_size 512", "300 pieces; set model.vocab_size to 300"]),
        (["pretrain.model.max_length=256"], ["have 512 tokens, the model's max_length is 256; set model.max_length"]),
        (["eval.replies.max_new_tokens=4000"], ["models.dpo: max_length", "4160 are asked for"]),
        (["sft.loop.rows_per_step=6"], ["rows_per_step=6 is not a multiple of rows_per_micro_batch=4 x 1 rank(s)"]),
        (["pretrain.model.kv_sharing={kind: adjacent, group: 2}"], ["cannot be exported"]),
        # all at once
        (["pretrain.model.vocab_size=512", "dpo.loop.rows_per_step=9"], ["300 pieces", "rows_per_step=9"]),
    ],
    ids=lambda value: value[0],
)
def test_what_does_not_fit_is_told(
    logs: list[str], capfd: pytest.CaptureFixture[str], overrides: list[str], messages: list[str]
) -> None:
    code, output = dry_run(capfd, *logs, *overrides)
    assert code == 2, output
    assert [message for message in messages if message not in output] == [], output


def test_bad_records_are_told(logs: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / "logs" / "a.jsonl").open("a") as file:
        file.write("\n{}\nnot JSON\n")
    code, output = dry_run(capfd, *logs)
    assert code == 2
    assert "2 of 62 records are bad, more than max_bad_fraction 0.01" in output
    assert f"{tmp_path}/logs/a.jsonl:61: " in output
    assert output.count("records are bad") == 1, "each problem once"


def test_bad_pairs_are_told(logs: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pairs.jsonl"
    said = [{"speaker": "Tom", "text": "hi"}]
    pair = {"id": "p", "messages": said, "character": "Mia", "chosen": "yes", "rejected": "no"}
    path.write_text(f"{json.dumps(pair)}\n{json.dumps({**pair, 'messages': []})}\n")
    given = f"dpo.pairs=[{{kind: file, path: {path}, max_bad_fraction: %s}}]"
    code, output = dry_run(capfd, *logs, given % "0.1")
    assert code == 2, output
    assert "50.0% of the records are left out, more than max_bad_fraction 0.1" in output
    assert f"{path}:2: only the character and the narrator write before the reply" in output
    code, output = dry_run(capfd, *logs, given % "0.5")
    assert code == 0, output


def test_too_few_heldout_dialogues_are_told(logs: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    code, output = dry_run(capfd, *logs, "eval.contexts.min_messages=50")
    assert code == 2
    assert "0 contexts found, at least 2 are needed" in output
    assert "contexts.min_messages: 7 is the most that two held-out dialogues have" in output


def test_prepared_data_counts_as_it_is(logs: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A real run is checked with the data that was made, before the first stage that trains."""
    from data.prepare import main as prepare

    stages = plan(Path(logs[0]), logs[2], logs[3:])
    assert prepare([str(stages[0].recipe_path), *stages[0].overrides]) == 0
    for planned in stages:
        planned.__dict__.pop("recipe", None)
    checked = PlanCheck(stages, reads_sources=False)
    checked.check()
    assert any("replies.n_contexts: 128 asked for" in note for note in checked.notes)
    code = main([*logs, "pretrain.model.vocab_size=512"])
    assert code == 2
    assert "300 pieces" in capfd.readouterr().err
    assert not (tmp_path / "runs" / "pretrain").exists()


def test_labels_of_one_class_are_told_before_anything_is_trained(
    logs: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """From the sources, and from the prepared data by the stage's own dry run."""
    from data.prepare import main as prepare
    from train.engagement import EngagementRecipe

    code, output = dry_run(capfd, *logs, "data.continue_within_seconds=null")
    assert code == 0, output
    path = tmp_path / "logs" / "a.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["messages"] = [*line["messages"], {"speaker": "Tom", "text": "bye", "time": 600}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, output = dry_run(capfd, *logs, "data.continue_within_seconds=null")
    assert code == 2
    assert "engagement.yaml: no targets on the training side: " in output
    assert "partner continues, 0 partner leaves. The scorer needs both" in output

    stages = plan(Path(logs[0]), logs[2], [*logs[3:], "data.continue_within_seconds=null"])
    assert prepare([str(stages[0].recipe_path), *stages[0].overrides]) == 0
    scorer = next(one for one in stages if one.name == "engagement")
    config = ModelConfig(vocab_size=300, d_model=8, n_layers=1, n_heads=1, d_head=8, d_ff=8, layers="G", max_length=512)
    save_model(tmp_path / "start" / "model", config, Transformer(config).state_dict())
    (tmp_path / "start" / "done.json").write_text("{}")
    recipe = load_recipe(EngagementRecipe, scorer.recipe_path, [*scorer.overrides, f"init_from={tmp_path}/start"])
    with pytest.raises(
        RecipeError, match=r"no targets in the training side: [\d,]+ partner continues, 0 partner leaves"
    ):
        check_alone(recipe, scorer.recipe_path, Console(quiet=True))


def test_a_run_that_nobody_writes_is_told(logs: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "unfinished").mkdir()
    code, output = dry_run(
        capfd, *logs, f"eval.models.other={tmp_path}/nope", f"sft.init_from={tmp_path}/unfinished",
        f"dpo.pairs=[{{kind: file, path: {tmp_path}/no.jsonl}}]",
    )  # fmt: skip
    assert code == 2
    for told in (
        f"eval.yaml: models.other: {tmp_path}/nope does not exist, and no stage of this pipeline writes it",
        f"sft.yaml: init_from: {tmp_path}/unfinished holds no finished run, and no stage of this pipeline writes it",
        f"dpo.yaml: pairs.0: {tmp_path}/no.jsonl does not exist",
    ):
        assert told in output, output


def test_a_scorer_is_a_run_of_engagement(logs: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    runs = logs[2]
    code, output = dry_run(capfd, *logs, f"dpo.pairs.0.scorer={runs}/sft", f"eval.scorer={runs}/pretrain")
    assert code == 2
    assert f"dpo.yaml: pairs.0.scorer: {runs}/sft is a run of stage sft; expected a reward model" in output
    assert f"eval.yaml: scorer: {runs}/pretrain is a run of stage pretrain; expected a reward model" in output


def test_figures_that_a_stage_does_not_compute_are_told(logs: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    for figure, better, told in (
        ("nonsense", "lower", "found nonsense, this stage computes heldout_loss"),
        ("heldout_loss", "higher", "found higher, but a lower heldout_loss is better"),
    ):
        code, output = dry_run(capfd, *logs, f"sft.loop.keep_best={{figure: {figure}, better: {better}}}")
        assert code == 2 and told in output, output


def test_pairs_that_do_not_fit_or_split_are_told_once_there_is_a_tokenizer(tmp_path: Path, logs: list[str]) -> None:
    from data.prepare import main as prepare
    from train.dpo import DPORecipe

    stages = plan(Path(logs[0]), logs[2], logs[3:])
    assert prepare([str(stages[0].recipe_path), *stages[0].overrides]) == 0
    said = [{"speaker": "Tom", "text": "hi there"}]
    pairs = [
        {"id": f"p{n}", "messages": [*said, {"speaker": "Tom", "text": f"{n}"}], "character": "Mia", "chosen": "yes",
         "rejected": "no"}
        for n in range(20)
    ]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    dpo = next(one for one in stages if one.name == "dpo")
    given = [*dpo.overrides, f"pairs=[{{kind: file, path: {tmp_path}/pairs.jsonl}}]", f"init_from={tmp_path}/none"]
    for overrides, told in (
        ([], None),
        (["max_pair_tokens=5"], "0 of 20 pairs fit max_pair_tokens 5"),
        (["heldout_fraction=0.0001"], "leaves 20 for training and 0 held out"),
        (["heldout_fraction=0.9999"], "leaves 0 for training and 20 held out"),
    ):
        recipe = load_recipe(DPORecipe, dpo.recipe_path, [*given, *overrides])
        with pytest.raises(RecipeError, match=re.escape(told)) if told else nullcontext():
            check_alone(recipe, dpo.recipe_path, Console(quiet=True))
