"""What stands in a kernel's way is told in the exception's own words, with the cause and what to install."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from model import attention_ops
from model.attention_ops import choose_backend, faster_backend
from model.execution import what_slows
from model.obstacle import INSTALL_GPU, Obstacle, failure, import_obstacle

QUACK = "epilogue fn depends on <x> (type a.B), which has no fail-closed semantic key. Supported: primitives"


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages on the search path, in which each test writes its own."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn-4 is installed")
def test_what_is_not_installed_is_missing() -> None:
    obstacle = import_obstacle("flash_attn.cute.interface")
    assert obstacle is not None and obstacle.kind == "missing"
    assert obstacle.words == "import flash_attn.cute.interface: No module named 'flash_attn'"
    assert (obstacle.cause, obstacle.remedy) == ("flash-attn-4 is not installed", INSTALL_GPU)
    assert import_obstacle("json") is None


@pytest.mark.parametrize(
    ("source", "words", "cause"),
    [
        ("import cutlass_that_is_not", "No module named 'cutlass_that_is_not'", "which is not installed"),
        ("from json import no_such_name", "cannot import name 'no_such_name'", "versions that are incompatible"),
        ("raise RuntimeError('No CTK flavor installed: expected one')", "RuntimeError: No CTK", "lacks its libraries"),
        ("raise OSError('libcuda.so.1: cannot open')", "OSError: libcuda.so.1: cannot open", ""),
    ],
)
def test_what_is_installed_and_fails_is_broken(packages: Path, source: str, words: str, cause: str) -> None:
    (packages / "a_kernel.py").write_text(source)
    obstacle = import_obstacle("a_kernel")
    assert obstacle is not None and obstacle.kind == "broken"
    assert words in obstacle.words and "import a_kernel" in obstacle.words
    assert cause in obstacle.cause


def test_quack_outside_of_site_packages_is_told_with_its_folder(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "quack", raising=False)  # of an installation
    (packages / "quack").mkdir()
    (packages / "quack" / "__init__.py").touch()
    obstacle = failure(TypeError(QUACK))
    assert obstacle.words == f"TypeError: {QUACK}"
    assert f"quack is in {packages / 'quack'}" in obstacle.cause
    assert "site-packages" in obstacle.cause and "virtual environment" in obstacle.remedy
    assert "version" not in str(obstacle)


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        ("Failed to find C compiler. Please specify via CC environment variable.", "C compiler"),
        ("main.c:3:10: fatal error: Python.h: No such file or directory", "Python's headers"),
        ("CUDA error: no kernel image is available for execution on the device", "compute capability"),
        ("The NVIDIA driver on your system is too old (found version 11040)", "driver is older"),
        ("CUDA out of memory. Tried to allocate 20.00 MiB", "memory is full"),
        ("nobody knows this", ""),
    ],
)
def test_known_failures_have_their_cause(words: str, cause: str) -> None:
    obstacle = failure(RuntimeError(words))
    assert obstacle.words == f"RuntimeError: {words}"
    assert cause in obstacle.cause and bool(obstacle.remedy) == bool(cause)


def test_a_page_of_words_is_cut_in_a_line_only() -> None:
    obstacle = failure(RuntimeError("word\n" * 1000))
    assert len(obstacle.words) > 4000
    assert len(str(obstacle)) < 500 and "\n" not in str(obstacle)


def test_a_faster_back_end_is_passed_over_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its import raises what is no ImportError; what the machine cannot run is not told."""
    broken = Obstacle("broken", "RuntimeError: no driver")

    def why_not(backend: str, *_: object) -> Obstacle | None:
        return {"flash_attn_4": Obstacle("unfit", "too old"), "flash_attn_2": broken}.get(backend)

    monkeypatch.setattr(attention_ops, "why_not", why_not)
    cpu = torch.device("cpu")
    assert choose_backend("auto", cpu, torch.bfloat16) == "varlen"
    assert faster_backend("varlen", cpu, torch.bfloat16) == ("flash_attn_2", broken)
    (told,) = what_slows("auto", "varlen", "auto", "plain", cpu, torch.bfloat16)
    assert "flash_attn_2" in told and "RuntimeError: no driver" in told and "python -m model.doctor" in told
    assert what_slows("varlen", "varlen", "auto", "plain", cpu, torch.bfloat16) == []


def test_nothing_is_told_where_all_is_as_fast_as_it_can_be() -> None:
    cpu = torch.device("cpu")
    assert what_slows("auto", "sdpa", "auto", "plain", cpu, torch.float32) == []


def test_the_gated_products_own_words_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    gated_product = pytest.importorskip("model.kernels.gated_product")
    monkeypatch.setattr(gated_product, "why_not_in_one", lambda *_: failure(TypeError(QUACK)))
    (told,) = what_slows("auto", "sdpa", "auto", "fused", torch.device("cpu"), torch.bfloat16)
    assert "is 2% slower" in told and QUACK in told and "site-packages" in told
