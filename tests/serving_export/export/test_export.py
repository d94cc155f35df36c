"""An export end to end: it verifies, transformers serves it, it is repeatable, and vanishes when it is wrong."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from rich.console import Console

from data.format.dialogue import Dialogue, Message
from data.format.tokenizer import DialogueTokenizer
from model.bundle_files import BundleError, verify
from model.hugging_face import load_exported_model
from model.transformer import Transformer
from model.weights import save_model
from recipes.files import write_text
from recipes.interrupt import EXIT_CODE
from recipes.loader import load_recipe
from serving_export.export import __main__ as export_module
from serving_export.export.__main__ import BUNDLE_FILES, COMMAND, ExportRecipe, Names, main, write_bundle
from serving_export.export.manifest import Defaults, read_defaults
from serving_export.export.parity import Parity, transformers_peer
from tests.interrupted import interrupted_at_import
from tests.written_data import write_dialogues

RECIPE = """\
stage: export
run_dir: {root}/export
init_from: {root}/sft
data: {root}/data
names: {{user: Bob, character: Ada}}
dtype: {dtype}
n_parity_conversations: 3
"""


def make_recipe(root: Path, tokenizer: DialogueTokenizer, model: Transformer, dtype: str = "float32") -> Path:
    (root / "data" / "dialogues").mkdir(parents=True)
    tokenizer.save(root / "data" / "tokenizer.model")
    dialogues = [
        Dialogue(
            str(n), tuple(Message(("Ada", "Bob")[i % 2], f"Hello there <|end|> {n}{i}\u2060") for i in range(n)), "Ada"
        )
        for n in (2, 3, 5, 8)
    ]
    write_dialogues(root / "data" / "dialogues" / "heldout.jsonl", dialogues)
    files = {"tokenizer.model": root / "data" / "tokenizer.model"}
    save_model(root / "sft" / "model", model.config, model.state_dict(), files=files)
    for stage in ("data", "sft"):
        write_text(root / stage / "done.json", "{}")
    path = root / "export.yaml"
    path.write_text(RECIPE.format(root=root, dtype=dtype))
    return path


def test_names_left_out_are_the_commonest_that_the_model_saw(
    tokenizer: DialogueTokenizer, model: Transformer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_recipe(tmp_path, tokenizer, model)
    said = [("Tom", "Mia")] * 3 + [("Ann", "Mia")] * 2 + [("Mia", "Tom")]
    dialogues = [
        Dialogue(str(n), (Message(user, "Hi"), Message(character, "Hello")), character)
        for n, (user, character) in enumerate(said)
    ]
    write_dialogues(tmp_path / "data" / "dialogues" / "train.jsonl", dialogues)
    assert main([str(path), "names=null"]) == 0
    defaults = read_defaults(tmp_path / "export")
    assert (defaults.user, defaults.character) == ("Tom", "Mia")
    assert "names: user Tom, character Mia: the most frequent of the training data" in capsys.readouterr().out
    assert main([str(path), f"run_dir={tmp_path}/other"]) == 0
    assert "not in the training data in this role: Ada, Bob (most frequent: Tom, Mia)" in capsys.readouterr().out


@pytest.fixture
def quiet() -> Console:
    return Console(quiet=True)


def test_transformers_draws_no_token_that_our_server_forbids(
    tokenizer: DialogueTokenizer, model: Transformer, tmp_path: Path
) -> None:
    write_bundle(tmp_path, model, tokenizer, Names(user="Bob", character="Ada"), "float32")
    peer, _ = transformers_peer(tmp_path)
    torch.manual_seed(0)
    prompts_BT = torch.tensor([[tokenizer.bos_id, tokenizer.message_id]] * 24)
    # a random model draws any of 400 tokens about as often as another
    drawn_BT = peer.generate(prompts_BT, max_new_tokens=60, eos_token_id=tokenizer.end_id)[:, 2:]
    replies = [row[: row.index(tokenizer.end_id)] if tokenizer.end_id in row else row for row in drawn_BT.tolist()]
    assert sum(map(len, replies)) > 600
    assert not {token for row in replies for token in row} & set(tokenizer.forbidden_in_reply)
    assert set(tokenizer.forbidden_in_reply) < set(peer.generation_config.eos_token_id)


def test_a_bundle_is_whole_and_says_so(
    tokenizer: DialogueTokenizer, model: Transformer, tmp_path: Path, quiet: Console
) -> None:
    recipe = load_recipe(ExportRecipe, make_recipe(tmp_path, tokenizer, model))
    COMMAND.run(recipe, quiet)
    bundle = tmp_path / "export"
    content = verify(bundle)
    assert set(content["files"]) == set(BUNDLE_FILES)
    assert content["parity"]["n_longer_than_window"] >= 1
    assert content["parity"]["n_greedy_tokens"] > 10
    assert content["parity"]["max_logit_difference"] <= 1e-4
    assert content["kv_bytes_per_token"] == model.config.kv_bytes_per_token(4)
    assert content["engines"]["vllm"] == {"runs": True}
    assert read_defaults(bundle) == Defaults("Bob", "Ada", model.config.max_length)
    loaded = load_exported_model(bundle).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    figure = json.loads((bundle / "done.json").read_text())["key_figure"]
    assert figure.startswith("logits equal to ")
    before = (bundle / "manifest.json").stat().st_mtime_ns
    COMMAND.run(recipe, quiet)
    assert (bundle / "manifest.json").stat().st_mtime_ns == before


def test_rounded_weights_are_compared_with_rounded_weights(
    tokenizer: DialogueTokenizer, model: Transformer, tmp_path: Path, quiet: Console
) -> None:
    COMMAND.run(load_recipe(ExportRecipe, make_recipe(tmp_path, tokenizer, model, "bfloat16")), quiet)
    content = verify(tmp_path / "export")
    assert content["parity"]["max_logit_difference"] <= 1e-4
    assert content["kv_bytes_per_token"] == model.config.kv_bytes_per_token(2)


def test_a_bundle_that_differs_is_removed(
    tokenizer: DialogueTokenizer,
    model: Transformer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = make_recipe(tmp_path, tokenizer, model)

    def wrong_config(*arguments: object, **ids: int) -> dict[str, object]:
        return {**honest(*arguments, **ids), "rope_parameters": {  # type: ignore[arg-type]
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            "full_attention": {"rope_type": "default", "rope_theta": 500.0},
        }}  # fmt: skip

    honest = export_module.hf_config
    monkeypatch.setattr(export_module, "hf_config", wrong_config)
    monkeypatch.setattr(export_module, "load_exported_model", lambda directory: model)
    assert main([str(path)]) == 1
    assert "logits differ" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "export").iterdir()] == [".lock"]
    monkeypatch.undo()
    assert main([str(path)]) == 0
    verify(tmp_path / "export")


def test_a_template_that_does_not_escape_is_refused(
    tokenizer: DialogueTokenizer,
    model: Transformer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = make_recipe(tmp_path, tokenizer, model)
    honest = export_module.chat_template
    monkeypatch.setattr(
        export_module, "chat_template", lambda *names: honest(*names).replace('replace("<|end|>"', 'replace("<|END|>"')
    )
    assert main([str(path)]) == 1
    assert "chat template" in capsys.readouterr().err
    assert not (tmp_path / "export" / "manifest.json").exists()


@pytest.mark.parametrize("name", [name for name in (*BUNDLE_FILES, "manifest.json") if name != "model.safetensors"])
def test_a_full_disk_is_one_message_that_names_the_file(
    tokenizer: DialogueTokenizer,
    model: Transformer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    path = make_recipe(tmp_path, tokenizer, model)

    def full(file: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{file}")).name == f".{name}.partial":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("recipes.files.os.fsync", full)
    monkeypatch.setattr(export_module, "check_bundle", lambda *_: Parity(1, 1, 1, 0.0, 1, 0, 1))
    assert main([str(path)]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path}/export/.staging/{name}: No space left on device; make room" in error
    assert "Traceback" not in error
    assert not [file for file in (tmp_path / "export").iterdir() if file.name in (*BUNDLE_FILES, "manifest.json")]


def test_ctrl_c_during_the_parity_check_is_one_line_and_keeps_the_files_that_were_there(
    tokenizer: DialogueTokenizer, model: Transformer, tmp_path: Path
) -> None:
    path = make_recipe(tmp_path, tokenizer, model)
    bundle = tmp_path / "export"
    COMMAND.run(load_recipe(ExportRecipe, path), Console(quiet=True))
    (bundle / "tokenizer.json").write_text("damaged, so the bundle is exported again")
    before = {
        file.name: file.read_bytes() for file in bundle.iterdir() if file.name in (*BUNDLE_FILES, "manifest.json")
    }
    done = interrupted_at_import("transformers", tmp_path, ["serving_export.export", str(path)])
    assert done.returncode == EXIT_CODE
    assert done.stderr.split("\n") == ["", "interrupted; run the same command again", ""]
    assert {name: (bundle / name).read_bytes() for name in before} == before
    assert not (bundle / ".staging").exists() and not (bundle / "done.json").exists()
    COMMAND.run(load_recipe(ExportRecipe, path), Console(quiet=True))
    verify(bundle)


def test_an_interrupted_export_starts_over(
    tokenizer: DialogueTokenizer, model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: Console
) -> None:
    recipe = load_recipe(ExportRecipe, make_recipe(tmp_path, tokenizer, model))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module, "key_figure", killed)
    with pytest.raises(KeyboardInterrupt):
        COMMAND.run(recipe, quiet)
    monkeypatch.undo()
    (tmp_path / "export" / ".staging").mkdir()
    (tmp_path / "export" / "model.safetensors").write_bytes(b"half")
    COMMAND.run(recipe, quiet)
    verify(tmp_path / "export")


@pytest.mark.parametrize("name", BUNDLE_FILES)
def test_a_changed_file_is_named(
    tokenizer: DialogueTokenizer, model: Transformer, tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    bundle = finished_bundle(tokenizer, model, tmp_path_factory)
    content = (bundle / name).read_bytes()
    try:
        (bundle / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(BundleError, match=name):
            verify(bundle)
        (bundle / name).unlink()
        with pytest.raises(BundleError, match=f"{name} is missing"):
            verify(bundle)
    finally:
        (bundle / name).write_bytes(content)


_finished: list[Path] = []


def finished_bundle(tokenizer: DialogueTokenizer, model: Transformer, factory: pytest.TempPathFactory) -> Path:
    if not _finished:
        root = factory.mktemp("finished")
        COMMAND.run(load_recipe(ExportRecipe, make_recipe(root, tokenizer, model)), Console(quiet=True))
        _finished.append(root / "export")
    return _finished[0]


def test_what_is_no_bundle_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a finished bundle"):
        verify(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(BundleError, match="damaged"):
        verify(tmp_path)


@pytest.mark.parametrize("where", ["data", "of_sft", "of_pretrain"])
def test_a_model_trained_with_a_prompt_template_is_refused(
    tokenizer: DialogueTokenizer, model: Transformer, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    path = make_recipe(tmp_path, tokenizer, model)
    runs = {
        "sft": f"init_from: {tmp_path}/pretrain\ndata: {tmp_path}/of_sft\n",
        "pretrain": f"init_from: null\ndata: {{kind: mixture, parts: [{{path: {tmp_path}/of_pretrain, weight: 1}}]}}\n",
        "data": "prompt_template: null\n",
    }
    runs[where] = "prompt_template: {path: group_chat.yml.j2, values: {}}\n"
    for name, text in runs.items():
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "recipe.yaml").write_text(text)
    for arguments in ([str(path)], [str(path), "--dry-run"]):
        assert main(arguments) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert f"{tmp_path / where} was prepared with prompt_template group_chat.yml.j2" in error
    assert not (tmp_path / "export" / "model.safetensors").exists()


def test_another_runs_tokenizer_is_refused(
    tokenizer: DialogueTokenizer, model: Transformer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_recipe(tmp_path, tokenizer, model)
    (tmp_path / "data" / "tokenizer.model").write_bytes(tokenizer.model_bytes + b"\x00")
    assert main([str(path)]) == 2
    assert "was not trained on" in capsys.readouterr().err
