"""Export a trained model as a bundle for stock engines: `python -m serving_export.export recipes/demo/export.yaml`.

The bundle is run_dir itself: a Hugging Face model directory with manifest.json. It is checked before it is moved there.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import PositiveFloat, PositiveInt, model_validator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.format.dialogue import Dialogue, check_speaker
from data.format.dialogue_json import read_dialogues
from data.format.encode import encode_dialogue
from data.format.speaker_names import SpeakerNames, names_trained_on
from data.format.tokenizer import MODEL_FILE, DialogueTokenizer
from data.prompt.template import DEFAULT_TEMPLATE, PromptTemplate
from data.sources.speaker import check_user
from model.bundle_files import MANIFEST, verify
from model.config import ModelConfig
from model.hugging_face import hf_config, load_exported_model, state_to_hf
from model.portability import describe
from model.transformer import Transformer
from model.weights import load_config, load_model, write_tensors
from recipes.files import atomic_file, sync_path, write_json, write_text
from recipes.loader import Section, print_error
from recipes.plan_check import PlanCheck
from recipes.run_identity import Location
from recipes.stage_command import Made, StageCommand
from serving_export.export.chat_template import chat_template
from serving_export.export.manifest import SERVING, Defaults, write_defaults, write_manifest
from serving_export.export.parity import (
    Parity,
    ParityError,
    check_logits,
    check_tokens,
    choose_conversations,
    longer_than,
    transformers_peer,
)
from serving_export.export.tokenizer_json import tokenizer_config, tokenizer_json
from serving_export.export.trained_data import check_no_prompt_template, template_refused

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BUNDLE_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "prompt.yml.j2", MODEL_FILE, SERVING,
)  # fmt: skip
_STAGING = ".staging"


class Names(Section):
    """The speakers of messages without a name, of role user and of role assistant."""

    user: str
    character: str

    @model_validator(mode="after")
    def _speakers(self) -> Names:
        check_user(self.user)
        check_speaker(self.character)
        return self


class ExportRecipe(Section):
    """An export: the model, the default names, and how closely transformers must agree with our runtime."""

    stage: Literal["export"]
    run_dir: Location
    init_from: Location
    data: Location
    # null: the most frequent character of the training data and its most frequent partner
    names: Names | None = None
    dtype: Literal["float32", "bfloat16", "float16"]
    n_parity_conversations: PositiveInt = 24
    max_logit_difference: PositiveFloat = 1e-4
    threads: PositiveInt | None = None

    def inputs(self) -> dict[str, str]:
        """The run directories that it reads, by name."""
        return {"init_from": self.init_from, "data": self.data}

    def check_plan(self, plan: PlanCheck) -> None:
        """Check that stock engines can run the model, and count the conversations for the parity check."""
        plan.check_inputs(self.inputs())
        facts, config = plan.data(self.data), plan.config(self.init_from)
        if config is not None:
            with plan.finding():
                hf_config(config, self.dtype, bos_id=2, end_id=4, pad_id=0)
            for problem in facts.misfits(config.vocab_size, config.max_length) if facts else ():
                plan.problem(problem)
        if facts and facts.prompt_template:
            plan.problem(template_refused(self.data, facts.prompt_template))
        if facts and facts.heldout is not None and (told := fewer_conversations(self, len(facts.heldout))):
            plan.note(told)


def write_bundle(directory: Path, model: Transformer, tokenizer: DialogueTokenizer, names: Names, dtype: str) -> None:
    """Write all files of a bundle except its manifest into an empty directory."""
    config = model.config
    if config.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"the model has {config.vocab_size} token ids, the tokenizer {tokenizer.vocab_size}; "
            "init_from and data belong to different runs"
        )
    ids = {"bos_id": tokenizer.bos_id, "end_id": tokenizer.end_id, "pad_id": tokenizer.pad_id}
    state = {name: tensor.to(DTYPES[dtype]).contiguous() for name, tensor in model.state_dict().items()}
    write_tensors(directory / "model.safetensors", state_to_hf(config, state), metadata={"format": "pt"})
    write_json(directory / "config.json", hf_config(config, dtype, **ids))
    write_json(directory / "generation_config.json", generation_config(tokenizer))
    write_text(directory / "tokenizer.json", tokenizer_json(tokenizer))
    write_json(directory / "tokenizer_config.json", tokenizer_config(config.max_length))
    write_text(directory / "chat_template.jinja", chat_template(names.user, names.character))
    write_text(directory / "prompt.yml.j2", DEFAULT_TEMPLATE)
    with atomic_file(directory / MODEL_FILE) as file:
        file.write(tokenizer.model_bytes)
    write_defaults(directory, Defaults(names.user, names.character, config.max_length))


def generation_config(tokenizer: DialogueTokenizer) -> dict[str, Any]:
    """generation_config.json: a reply ends at `<|end|>` and has no other control token.

    transformers never samples `suppress_tokens`. vLLM and SGLang ignore that list but end a reply at any of
    `eos_token_id`, so text after a `<|message|>` never becomes part of the reply.
    """
    return {
        "do_sample": True,
        "temperature": 1.0,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": [tokenizer.end_id, *tokenizer.forbidden_in_reply],
        "pad_token_id": tokenizer.pad_id,
        "suppress_tokens": list(tokenizer.forbidden_in_reply),
    }


def check_bundle(
    directory: Path,
    dialogues: list[Dialogue],
    recipe: ExportRecipe,
    names: Names,
    on_progress: Callable[[int], None] | None = None,
) -> Parity:
    """Compare the bundle in transformers, in float32, with our runtime on the same (rounded) weights.

    Raises ParityError.
    """
    tokenizer = DialogueTokenizer.load(directory)
    model = load_exported_model(directory)
    peer, peer_tokenizer = transformers_peer(directory)
    chosen = choose_conversations(tokenizer, dialogues, recipe.n_parity_conversations)
    if all(len(encode_dialogue(tokenizer, dialogue).tokens) <= model.config.window for dialogue in chosen):
        chosen = [*chosen[:-1], longer_than(tokenizer, chosen[-1], model.config.window)]  # tests the window
    template = PromptTemplate.load(directory / "prompt.yml.j2")
    n_texts = check_tokens(tokenizer, peer_tokenizer, template, chosen, (names.user, names.character))
    parity = check_logits(model, peer, tokenizer, chosen, recipe.max_logit_difference, on_progress)
    return replace(parity, n_texts=n_texts)


def export(recipe: ExportRecipe, console: Console) -> str:
    """Write the bundle to a staging directory, check it, move it into recipe.run_dir; returns the key figure.

    Files of an earlier export stay until the new ones are checked. The manifest is removed first and moved last, so a
    directory with a manifest is a whole bundle. Raises ParityError if the bundle differs from our runtime.
    """
    target = Path(recipe.run_dir)
    staging = target / _STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        parity = _stage(staging, recipe, console)
    except BaseException:
        shutil.rmtree(staging)
        raise
    (target / MANIFEST).unlink(missing_ok=True)
    sync_path(target)
    for name in (*BUNDLE_FILES, MANIFEST):
        (staging / name).replace(target / name)
    staging.rmdir()
    sync_path(target)
    return key_figure(parity)


def key_figure(parity: Parity) -> str:
    """One line with the results of the checks."""
    difference = f"{parity.max_logit_difference:.0e}".replace("e-0", "e-")
    return f"logits equal to {difference}, {parity.n_conversations} conversations, {parity.n_texts} hostile texts"


def _stage(staging: Path, recipe: ExportRecipe, console: Console) -> Parity:
    source = _model_directory(recipe.init_from)
    model = load_model(source)
    names, told = choose_names(recipe.names, names_trained_on(recipe.data))
    console.print(told, highlight=False, markup=False, soft_wrap=True)
    write_bundle(staging, model, DialogueTokenizer.load(_tokenizer_of(source, recipe)), names, recipe.dtype)
    _check_weights(staging, model, recipe.dtype)
    dialogues = list(read_dialogues(Path(recipe.data) / "dialogues" / "heldout.jsonl"))
    if fewer := fewer_conversations(recipe, len(dialogues)):
        console.print(fewer, highlight=False, soft_wrap=True)
    columns = (TextColumn("parity"), BarColumn(), MofNCompleteColumn(), TextColumn("ETA"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("parity", total=recipe.n_parity_conversations)
        parity = check_bundle(staging, dialogues, recipe, names, lambda done: progress.update(task, completed=done))
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "tokenizers", "sentencepiece")}
    figures = asdict(parity) | {"limit": recipe.max_logit_difference, "dtype": recipe.dtype}
    write_manifest(staging, BUNDLE_FILES, model.config, DTYPES[recipe.dtype].itemsize, figures, versions)
    verify(staging)
    for path in staging.iterdir():
        path.chmod(0o644)  # the server often runs as another user
        sync_path(path)
    return parity


def choose_names(asked: Names | None, seen: SpeakerNames) -> tuple[Names, str]:
    """The default names of a chat's user and character, and a line that explains the choice."""
    commonest = seen.commonest()
    if asked is None:
        if commonest is None:
            raise ValueError(
                "names: no dialogue of the data has a character and a partner; set names: {user: ..., character: ...}"
            )
        names = Names(user=commonest[0], character=commonest[1])
        return names, f"names: user {names.user}, character {names.character}: the most frequent of the training data"
    strange = [name for name in (asked.character,) if name not in seen.characters]
    if asked.user not in {name for partners in seen.partners.values() for name in partners}:
        strange.append(asked.user)
    told = f"names: user {asked.user}, character {asked.character}"
    if strange and commonest is not None:
        told += f"; not in the training data in this role: {', '.join(strange)}"
        told += f" (most frequent: {commonest[0]}, {commonest[1]})"
    return asked, told


def fewer_conversations(recipe: ExportRecipe, n_heldout: int) -> str | None:
    """A message if there are fewer held-out dialogues than the recipe asks for."""
    wanted = recipe.n_parity_conversations
    return (
        f"n_parity_conversations: {wanted} asked for, {n_heldout} held-out dialogues found; all are compared"
        if n_heldout < wanted
        else None
    )


def _check_weights(staging: Path, model: Transformer, dtype: str) -> None:
    """Raise ParityError unless the weights read from the bundle equal the run's, rounded to the bundle's dtype."""
    written = load_exported_model(staging).state_dict()
    for name, tensor in model.state_dict().items():
        if not torch.equal(written[name], tensor.to(DTYPES[dtype]).float()):
            raise ParityError(f"the weight {name} of the bundle differs from the trained one")


def _model_directory(init_from: str) -> Path:
    """A run directory's model/, or a model directory itself."""
    inner = Path(init_from) / "model"
    return inner if inner.is_dir() else Path(init_from)


def _tokenizer_of(source: Path, recipe: ExportRecipe) -> Path:
    """The tokenizer saved with the weights. Raises ValueError if it differs from the data's."""
    held, data = source / MODEL_FILE, Path(recipe.data) / MODEL_FILE
    if held.is_file() and data.is_file() and held.read_bytes() != data.read_bytes():
        raise ValueError(f"{held} and {data} differ: init_from was not trained on data={recipe.data}")
    return held if held.is_file() else data


def _is_whole(run_dir: Path) -> bool:
    """True. Raises the error of `verify` for a changed bundle, which is not replaced without confirmation."""
    verify(run_dir)
    return True


def make(recipe: ExportRecipe, console: Console) -> Made:
    """Export into recipe.run_dir."""
    check_no_prompt_template(recipe.init_from, recipe.data)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    target, figure = Path(recipe.run_dir), export(recipe, console)
    content = json.loads((target / MANIFEST).read_text(encoding="utf-8"))

    def report(seconds: float, console: Console) -> None:
        console.print(f"[bold]{figure}[/]", highlight=False)
        console.print(f"bundle: {target.resolve()} (vllm serve {target})", highlight=False, soft_wrap=True)

    return Made(figure, report, {key: content[key] for key in ("parity", "kv_bytes_per_token", "engines")})


def print_plan(recipe: ExportRecipe, console: Console) -> None:
    """Print the model that a run would export."""
    check_no_prompt_template(recipe.init_from, recipe.data)
    source = _model_directory(recipe.init_from)
    if not (source / "config.json").is_file():
        console.print(f"{recipe.init_from} is not finished yet", highlight=False)
        return
    config: ModelConfig = load_config(source)
    hf_config(config, recipe.dtype, bos_id=2, end_id=4, pad_id=0)
    for what, value in describe(config):
        console.print(f"{what:>20}  {value}", highlight=False, markup=False, soft_wrap=True)


COMMAND = StageCommand(
    ExportRecipe,
    __doc__,
    make,
    print_plan,
    files=(MANIFEST, *BUNDLE_FILES, _STAGING, "environment.json"),
    outputs=BUNDLE_FILES,
    by_size=(MANIFEST,),
    replaces_at_end=True,
    recipe_errors=(ParityError,),
    passed_on=(ParityError,),
    is_whole=_is_whole,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0 when the bundle is written, 1 when it differs from our runtime, 2 for a user error."""
    try:
        return COMMAND.main(argv)
    except ParityError as error:
        print_error(error, "the bundle differs from our runtime; nothing was exported")
        return 1


if __name__ == "__main__":
    sys.exit(main())
