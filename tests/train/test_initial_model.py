"""Pre-training goes on from a run or from an exported bundle: the same weights, bit for bit, and one tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from data.format.tokenizer import DialogueTokenizer, train_tokenizer
from model.bundle_files import BundleError
from model.transformer import Transformer
from model.weights import save_model
from recipes.loader import RecipeError, load_recipe
from serving_export.export.__main__ import BUNDLE_FILES, Names, write_bundle
from serving_export.export.manifest import write_manifest
from train.deepspeed.world import World
from train.initial_model import InitialModelError, check_same_architecture, init_input, initial_model
from train.pretrain import PretrainRecipe, architecture, prepare
from train.summary import summarize

ALONE = World(0, 1, torch.device("cpu"))


def changed(recipe: Path, init_from: Path, keep_model: bool = False) -> PretrainRecipe:
    text = recipe.read_text()
    head, rest = text.split("model:", 1)
    section, tail = rest.split("threads:", 1)
    middle = f"model:{section}" if keep_model else ""
    recipe.write_text(f"{head}{middle}init_from: {init_from}\nngram_baselines: false\nthreads:{tail}")
    return load_recipe(PretrainRecipe, recipe)


@pytest.fixture
def weights(pretrain_recipe: Path) -> Transformer:
    config = load_recipe(PretrainRecipe, pretrain_recipe).model
    assert config is not None
    return Transformer(config, "auto", seed=7)


def run_directory(folder: Path, weights: Transformer, data_dir: Path) -> Path:
    tokenizer = {"tokenizer.model": data_dir / "tokenizer.model"}
    save_model(folder / "model", weights.config, weights.state_dict(), files=tokenizer)
    return folder


def bundle(folder: Path, weights: Transformer, data_dir: Path) -> Path:
    folder.mkdir()
    tokenizer = DialogueTokenizer.load(data_dir)
    write_bundle(folder, weights, tokenizer, Names(user="Ann", character="Ben"), "float32")
    write_manifest(folder, BUNDLE_FILES, weights.config, dtype_bytes=4, parity={}, versions={})
    return folder


@pytest.mark.parametrize("make", [run_directory, bundle])
@pytest.mark.parametrize("keep_model", [True, False])
def test_the_weights_are_those_of_init_from(
    make: object, keep_model: bool, pretrain_recipe: Path, data_dir: Path, tmp_path: Path, weights: Transformer
) -> None:
    source = make(tmp_path / "source", weights, data_dir)  # type: ignore[operator]
    recipe = changed(pretrain_recipe, source, keep_model)
    assert "33,792" in "\n".join(summarize(recipe, recipe.data, architecture(recipe)).lines)
    found = prepare(recipe, ALONE, Console(quiet=True)).module.trunk
    assert found.training
    expected = weights.state_dict()
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())


def test_a_bundle_is_known_by_its_manifest(data_dir: Path, tmp_path: Path, weights: Transformer) -> None:
    made = bundle(tmp_path / "bundle", weights, data_dir)
    assert init_input(str(made)) == str(made / "manifest.json")
    run = run_directory(tmp_path / "run", weights, data_dir)
    assert init_input(str(run)) == str(run)


def test_another_architecture_is_an_error(
    pretrain_recipe: Path, data_dir: Path, tmp_path: Path, weights: Transformer
) -> None:
    source = run_directory(tmp_path / "source", weights, data_dir)
    recipe = changed(pretrain_recipe, source, keep_model=True)
    assert recipe.model is not None
    other = recipe.model_copy(update={"model": recipe.model.model_copy(update={"d_ff": 64})})
    with pytest.raises(InitialModelError, match=r"model\.d_ff: there 48, here 64"):
        architecture(other)


def test_another_tokenizer_is_an_error(
    pretrain_recipe: Path, data_dir: Path, tmp_path: Path, weights: Transformer
) -> None:
    source = run_directory(tmp_path / "source", weights, data_dir)
    (tmp_path / "other").mkdir()
    train_tokenizer(["other words than those", "of the data"] * 200, tmp_path / "other", 300)
    shutil.copyfile(tmp_path / "other" / "tokenizer.model", source / "model" / "tokenizer.model")
    with pytest.raises(InitialModelError, match=r"is not the tokenizer of the model .*kind: file, path: \S+model}"):
        prepare(changed(pretrain_recipe, source), ALONE, Console(quiet=True))


def test_no_model_and_no_architecture_are_errors(pretrain_recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(InitialModelError, match="does not exist; expected the run_dir of a finished training stage"):
        prepare(changed(pretrain_recipe, tmp_path / "nowhere", keep_model=True), ALONE, Console(quiet=True))
    with pytest.raises(RecipeError, match="model: missing; give the architecture, or init_from"):
        load_recipe(PretrainRecipe, pretrain_recipe, ["model=null", "init_from=null"])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.model"])
def test_a_changed_file_of_a_bundle_is_named(
    pretrain_recipe: Path, data_dir: Path, tmp_path: Path, weights: Transformer, name: str
) -> None:
    source = bundle(tmp_path / "source", weights, data_dir)
    recipe = changed(pretrain_recipe, source)
    content = bytearray((source / name).read_bytes())
    content[-1] ^= 1  # the last bit of a weight: the file stays one that can be read
    (source / name).write_bytes(content)
    with pytest.raises(BundleError, match=rf"{name} has changed since it was exported"):
        prepare(recipe, ALONE, Console(quiet=True))
    (source / "manifest.json").unlink()
    with pytest.raises(BundleError, match=r"manifest\.json does not exist: \S+ is not a finished bundle"):
        prepare(recipe, ALONE, Console(quiet=True))


def test_only_rank_0_hashes_a_bundle(data_dir: Path, tmp_path: Path, weights: Transformer) -> None:
    source = bundle(tmp_path / "source", weights, data_dir)
    content = bytearray((source / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (source / "model.safetensors").write_bytes(content)
    other = World(1, 2, torch.device("cpu"))
    initial_model(str(source), other)
    with pytest.raises(BundleError, match="has changed"):
        initial_model(str(source), World(0, 2, torch.device("cpu")))
    (source / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(BundleError, match=r"bytes, the manifest says"):
        initial_model(str(source), other)


@pytest.mark.parametrize("make", [run_directory, bundle])
def test_weights_are_loaded_in_the_engines_dtype(
    make: Callable[..., Path], data_dir: Path, tmp_path: Path, weights: Transformer
) -> None:
    source = make(tmp_path / "source", weights, data_dir)
    loaded = initial_model(str(source), ALONE).load("auto", torch.device("cpu"), torch.bfloat16)
    assert loaded.training
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert all(map(torch.equal, loaded.state_dict().values(), weights.bfloat16().state_dict().values()))


def test_architectures_are_equal_however_their_layers_are_written(weights: Transformer) -> None:
    config = weights.config
    spelled = config.model_copy(update={"layers": "".join(config.layer_kinds)})
    check_same_architecture(config, spelled, "here")
    with pytest.raises(InitialModelError, match=r"model\.window: there 9, here 8"):
        check_same_architecture(config, config.model_copy(update={"window": 9}), "here")
    whole = config.model_copy(update={"layers": "G"})
    check_same_architecture(whole, whole.model_copy(update={"window": 9}), "here")  # no layer has a window


def test_the_folder_of_a_runs_model_is_no_initial_model(tmp_path: Path, weights: Transformer, data_dir: Path) -> None:
    source = run_directory(tmp_path / "source", weights, data_dir)
    (source / "done.json").write_text("{}")
    with pytest.raises(InitialModelError, match=rf"{source}/model: the folder of a run's model; name the run instead"):
        initial_model(str(source / "model"), ALONE)
    assert initial_model(str(source), ALONE).directory == source / "model"
