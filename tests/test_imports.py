"""Packages import only what is below them, absolutely; heavy optional libraries are imported where they are used."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT: dict[str, set[str]] = {
    "recipes": set(),
    "model": {"recipes.files", "recipes.interrupt"},
    "data": {"recipes"},
    "eval": {"recipes", "model", "data"},
    "train": {"recipes", "model", "data", "eval"},
    "serving_export": {"recipes", "model", "data"},
}
# Everything must import on a laptop, and a command line must answer quickly.
ONLY_INSIDE_FUNCTIONS = {"deepspeed", "wandb", "transformers", "matplotlib", "datasets", "flash_attn", "triton", "vllm"}
NEED_TRITON = tuple(
    f"model.kernels.{name}"
    for name in (
        "add_rows",
        "cache_write",
        "cross_entropy",
        "decode_attention",
        "decode_norm",
        "decode_plan",
        "decode_prefetch",
        "decode_product",
        "decode_product_tiles",
        "decode_rotary",
        "decode_vector_product",
        "fused_block",
        "gated_product",
        "geglu",
        "launch",
        "norm",
        "paged_attention",
        "prefill_attention",
        "rotary",
        "sample",
    )
)
"""Modules that import Triton; among them they may import each other, all else imports them inside functions."""
FILES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[tuple[int, str, int]]:
    """(line, module, level of dots) of every import in a syntax tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or "", node.level


def at_import_time(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported: those in functions and under TYPE_CHECKING do not."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from at_import_time(node.orelse)
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef):
            parts = [node.body, getattr(node, "orelse", []), getattr(node, "finalbody", [])]
            parts += [handler.body for handler in getattr(node, "handlers", [])]
            for part in parts:
                yield from at_import_time(part)
        else:
            yield node


def problems(package: str, source: str, needs_triton: bool = False) -> list[str]:
    """What a file of `package` imports that it may not; `needs_triton`: it is one of NEED_TRITON."""
    found = []
    tree = ast.parse(source)
    for line, module, level in imports(tree):
        top = module.partition(".")[0]
        if level:
            found.append(f"{line}: relative import; write it from the checkout's root")
        elif top in MAY_IMPORT and top != package and not {top, module} & MAY_IMPORT[package]:
            found.append(f"{line}: {package} may not import {top}")
        elif top == "tests":
            found.append(f"{line}: {package} may not import tests")
    for node in tree.body:
        if isinstance(node, ast.Import):
            found += [
                f"{node.lineno}: import {alias.name}; write from {alias.name} import ..."
                for alias in node.names
                if alias.name.partition(".")[0] in MAY_IMPORT
            ]
    for statement in at_import_time(tree.body):
        for line, module, _ in imports(statement):
            is_heavy = module.partition(".")[0] in ONLY_INSIDE_FUNCTIONS - ({"triton"} if needs_triton else set())
            if is_heavy or (not needs_triton and module.startswith(NEED_TRITON)):
                found.append(f"{line}: {module} at module level; import it inside the function that needs it")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_is_below_it(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    needs_triton = ".".join(parts).startswith(NEED_TRITON)
    assert problems(parts[0], path.read_text(encoding="utf-8"), needs_triton) == []


@pytest.mark.parametrize("module", sorted(MAY_IMPORT["model"]))
def test_a_module_that_model_may_import_imports_nothing_of_ours(module: str) -> None:
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    assert not {module.partition(".")[0] for _, module, _ in imports(tree)} & set(MAY_IMPORT)


def test_there_is_something_to_check() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(MAY_IMPORT)
    assert {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()} == set(MAY_IMPORT)
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.mark.parametrize(
    ("package", "source", "message"),
    [
        ("model", "from recipes.loader import Section", "model may not import recipes"),
        ("model", "from recipes import files", "model may not import recipes"),
        ("data", "def f():\n    from train.loop import train", "2: data may not import train"),
        ("eval", "import train.loop", "eval may not import train"),
        ("train", "from .loop import train", "relative import"),
        ("eval", "import eval.run", "write from eval.run import"),
        ("train", "import deepspeed", "deepspeed at module level"),
        ("train", "try:\n    import wandb\nexcept ImportError:\n    wandb = None", "2: wandb at module level"),
        ("model", "class A:\n    from triton import jit", "2: triton at module level"),
        ("train", "from model.kernels.norm import add_norm", "1: model.kernels.norm at module level"),
    ],
)
def test_a_breach_is_found(package: str, source: str, message: str) -> None:
    assert any(message in problem for problem in problems(package, source))


@pytest.mark.parametrize(
    "source",
    [
        "from model.config import ModelConfig\nfrom data.packed.batch import collate",
        "def f() -> None:\n    import deepspeed",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import deepspeed",
    ],
)
def test_what_is_allowed_is_not_found(source: str) -> None:
    assert problems("train", source) == []
