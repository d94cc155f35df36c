"""Tests of eval/run.py and eval/workspace.py: the whole evaluation on a pipeline in miniature, and its errors."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from data.format.dialogue import Dialogue
from data.format.dialogue_json import read_dialogues
from data.format.tokenizer import DialogueTokenizer
from data.packed.shards import PackedDataset
from eval.report import to_json
from eval.run import PARTS, evaluate, key_figure, main
from eval.workspace import BootstrapSection, EvalRecipe
from recipes.interrupt import EXIT_CODE
from recipes.loader import load_recipe
from tests.eval.conftest import write_packed
from tests.interrupted import interrupted_at_import

DEMO = Path(__file__).parents[2] / "recipes" / "demo" / "eval.yaml"


def overrides(root: Path) -> list[str]:
    return [
        f"run_dir={root / 'eval'}", f"data={root / 'data'}", f"scorer={root / 'engagement'}",
        *(f"models.{name}={root / name}" for name in ("pretrain", "sft", "dpo")),
        "bootstrap.n_resamples=50", "contexts.max_prompt_tokens=60", "contexts.min_messages=2",
        "replies.n_contexts=12", "replies.max_new_tokens=8", "replies.shown=3", "perplexity.heldout_rows=6",
        "ranking.n_contexts=8", "ranking.n_distractors=3", "engagement.heldout_rows=20",
        "user_sensitivity.n_contexts=6",
    ]  # fmt: skip


def call(monkeypatch: pytest.MonkeyPatch, root: Path, *extra: str) -> int:
    monkeypatch.setattr("sys.argv", ["eval.run", str(DEMO), *overrides(root), *extra])
    return main()


def check_samples(root: Path, samples: list[dict[str, Any]]) -> None:
    """Each is the beginning of a held-out dialogue and what was said there; a reply of 8 tokens is cut."""
    dialogues = list(read_dialogues(root / "data" / "dialogues" / "heldout.jsonl"))
    for sample in samples:
        human, *others = sample["replies"]
        shown = [(m["speaker"], m["text"]) for m in sample["context"]] + [(sample["character"], human["text"])]
        begin, texts = sample["n_earlier"], [[(m.speaker, m.text) for m in dialogue.messages] for dialogue in dialogues]
        assert begin >= 0 and any(text[begin : begin + len(shown)] == shown for text in texts)
        assert human["finished"] and human["system"] == "human"
        assert [reply["system"] for reply in others] == ["pretrain", "sft", "dpo"]
    assert not all(reply["finished"] for sample in samples for reply in sample["replies"])
    assert any(sample["n_earlier"] for sample in samples)


def check_units(report: dict[str, Any]) -> None:
    """Intervals are over dialogues: one context each."""
    ranking, quality = report["ranking"]["models"]["sft"], report["quality"]["systems"]["sft"]
    assert ranking["mean_logprob"]["mrr"]["n_clusters"] == 8 and quality["length_words"]["n_clusters"] == 12
    preference = report["preference"]
    assert preference["win_rate"]["n_clusters"] == preference["drift"]["on_model"]["nats_per_token"]["n_clusters"] == 12
    assert report["user_sensitivity"]["models"]["sft"]["user"]["kl"]["n_clusters"] == 6
    assert report["engagement"]["auc"]["n_clusters"] == report["engagement"]["n_dialogues"] > 6


def test_intervals_know_who_takes_part_in_several_dialogues(
    tmp_path: Path, dialogues: list[Dialogue], tokenizer: DialogueTokenizer
) -> None:
    """Dialogues with the same id are pieces of one conversation, and linked like those with the same person."""
    people, alone = [[number % 3] for number in range(20)], [[number] for number in range(20)]
    pieces = [replace(dialogue, id=f"piece of {number % 3}") for number, dialogue in enumerate(dialogues[:20])]
    for name, some, participants in (("shared", dialogues[:20], people), ("alone", dialogues[:20], alone),
                                     ("pieces", pieces, alone)):  # fmt: skip
        write_packed(tmp_path / name, some, tokenizer, participants)
        bootstrap = BootstrapSection(n_resamples=50).over(PackedDataset(tmp_path / name), seed=0)
        estimate = bootstrap.mean([float(number % 3) for number in range(20)], np.arange(20))
        assert (estimate.variance_factor > 2) == ("widened" in estimate.method) == (name != "alone")


def test_whole_evaluation(pipeline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (pipeline / "sft" / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\n{"step": 2, "heldout_loss": 4.0}\n')
    assert call(monkeypatch, pipeline) == 0
    report = json.loads((pipeline / "eval" / "report.json").read_text())
    assert all(report[part] for part in PARTS)
    assert list(report["perplexity"]["models"]) == ["pretrain", "sft", "dpo"]
    # Untrained models know nothing: their loss is near that of a uniform guess, far above the count models.
    assert report["perplexity"]["models"]["sft"]["loss"]["value"] > report["perplexity"]["ngrams"]["bigram_kneser_ney"]
    assert report["quality"]["systems"]["human"]["stop_rate"]["value"] == 1
    assert report["precision"].startswith("float32, CPU" if not torch.cuda.is_available() else "the dtype")
    assert len(report["samples"]) == 3 and len(report["samples"][0]["replies"]) == 4
    check_samples(pipeline, report["samples"])
    check_units(report)
    assert report["training_curves"]["sft"]["heldout_loss"] == [4.0]
    assert report["user_sensitivity"]["models"]["sft"]["ignored_last_user_messages"] == 0
    done = json.loads((pipeline / "eval" / "done.json").read_text())
    assert "pretrain" in done["key_figure"] and "dpo win" in done["key_figure"]
    for number, figures in enumerate(report["ranking"]["models"].values()):
        figures["mean_logprob"]["recall_at_1"]["value"] = number / 10
    assert "recall@1 0.20," in key_figure(report), "of the last model"
    assert "<h2>Conversations</h2>" in (pipeline / "eval" / "report.html").read_text()

    capsys.readouterr()
    assert call(monkeypatch, pipeline) == 0
    assert "is finished" in " ".join(capsys.readouterr().out.split())  # the console breaks lines


def test_ctrl_c_during_the_evaluation_is_one_line_and_keeps_the_report_that_was_there(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    off = [f"{key}=null" for key in ("scorer", *PARTS) if key not in ("quality", "perplexity")]
    assert call(monkeypatch, pipeline, *off) == 0
    run_dir = pipeline / "eval"
    (run_dir / "plots" / "loss.png").unlink()  # so the report is made again
    before = {path: path.read_bytes() for path in (run_dir / "report.json", run_dir / "report.html")}
    starts = len(json.loads((run_dir / "environment.json").read_text())["starts"])
    command = ["eval.run", str(DEMO), *overrides(pipeline), *off]
    done = interrupted_at_import("scipy.stats", pipeline, command)
    assert done.returncode == EXIT_CODE
    assert done.stderr.split("\n") == ["", "interrupted; run the same command again", ""]
    assert len(json.loads((run_dir / "environment.json").read_text())["starts"]) == starts + 1, "before the evaluation"
    assert {path: path.read_bytes() for path in before} == before
    assert not (run_dir / "done.json").exists()
    assert call(monkeypatch, pipeline, *off) == 0
    assert (run_dir / "plots" / "loss.png").exists()


def test_same_seed_gives_the_same_numbers(pipeline: Path) -> None:
    recipe = load_recipe(EvalRecipe, DEMO, overrides(pipeline))
    first, second = (to_json(evaluate(recipe, Console(quiet=True))) for _ in range(2))
    only_replies = dict.fromkeys(("perplexity", "ranking", "engagement", "preference", "user_sensitivity"))
    another_seed = recipe.model_copy(update={"seed": 1, **only_replies})
    other = to_json(evaluate(another_seed, Console(quiet=True)))
    assert {part: first[part] for part in PARTS} == {part: second[part] for part in PARTS}
    assert first["samples"] == second["samples"] != other["samples"]


def test_dry_run_says_what_is_missing(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (pipeline / "dpo" / "done.json").unlink()
    assert call(monkeypatch, pipeline, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "not finished" in " ".join(out.split()) and "quality" in out
    assert not (pipeline / "eval").exists()


def failure(pipeline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *extra: str) -> str:
    assert call(monkeypatch, pipeline, *extra) == 2
    assert not (pipeline / "eval" / "done.json").exists()
    return capsys.readouterr().err


def test_missing_and_unfinished_inputs_are_named(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (pipeline / "dpo" / "done.json").unlink()
    assert "models.dpo" in failure(pipeline, monkeypatch, capsys)
    shutil.rmtree(pipeline / "engagement")
    (pipeline / "dpo" / "done.json").write_text("{}")
    assert "scorer" in failure(pipeline, monkeypatch, capsys)


def test_a_model_with_another_tokenizer_is_refused(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (pipeline / "sft" / "model" / "tokenizer.model").write_bytes(b"another")
    assert "models.sft" in (error := failure(pipeline, monkeypatch, capsys)) and "another tokenizer" in error


def test_no_context_is_refused(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = failure(pipeline, monkeypatch, capsys, "contexts.min_messages=500")
    assert "0 contexts found, at least 2 are needed" in told


def test_a_model_too_short_is_refused(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "max_length" in failure(pipeline, monkeypatch, capsys, "replies.max_new_tokens=300")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("preference.model=best", "preference.model: found 'best'"),
        ("scorer=null", "needs a scorer"),
        ("models.human=runs/x", "models.human"),
        ("bootstrap.confidence_level=95", "less than 1"),
    ],
)
def test_recipe_mistakes_are_named(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(EvalRecipe, DEMO, [override])


def preference_of(root: Path, *extra: str) -> dict[str, Any]:
    off = [f"{key}=null" for key in ("perplexity", "ranking", "engagement", "user_sensitivity")]
    recipe = load_recipe(EvalRecipe, DEMO, [*overrides(root), *off, "replies.shown=12", *extra])
    report: dict[str, Any] = to_json(evaluate(recipe, Console(quiet=True)))
    return report


def test_the_preference_is_for_the_model_and_not_against_it(pipeline: Path) -> None:
    report = preference_of(pipeline)
    probabilities = [{r["system"]: r["probability"] for r in sample["replies"]} for sample in report["samples"]]
    assert len(probabilities) == 12
    part = report["preference"]
    gains = [of["dpo"] - of["sft"] for of in probabilities]
    assert part["probability_gain"]["value"] == pytest.approx(np.mean(gains), abs=1e-9) != 0
    assert part["win_rate"]["value"] == np.mean([(gain > 0) + 0.5 * (gain == 0) for gain in gains])
    over_human = np.mean([of["dpo"] > of["human"] for of in probabilities])
    assert part["win_rate_against_human"]["value"] == over_human
    # under the own samples this is a KL divergence, under the other model's the negative of one
    assert (
        part["drift"]["on_model"]["nats_per_reply"]["value"]
        > 0
        > part["drift"]["on_against"]["nats_per_reply"]["value"]
    )


def test_equal_models_give_equal_replies(pipeline: Path) -> None:
    """A context has the same random numbers for every model."""
    part = preference_of(pipeline, f"models.dpo={pipeline / 'sft'}")["preference"]
    assert part["identical_replies"] == part["n_contexts"] == 12
    assert part["win_rate"]["value"] == 0.5 and part["tests"]["ties"] == 12


def test_parts_can_be_left_out(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    off = [f"{key}=null" for key in ("scorer", *PARTS) if key != "quality"]
    assert call(monkeypatch, pipeline, *off) == 0
    report = json.loads((pipeline / "eval" / "report.json").read_text())
    assert [part for part in PARTS if report[part]] == ["quality"]
