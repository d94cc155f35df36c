"""OpenMP threads spin only briefly in every process of ours that loads PyTorch, unless the environment differs."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from recipes.openmp import SPINS

ROOT = Path(__file__).parents[2]


def openmp_settings(code: str, **variables: str) -> set[str]:
    """What each OpenMP library that this code loads says of its spins, in a new process."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
        env={**environment, "OMP_DISPLAY_ENV": "VERBOSE", **variables},
    )  # fmt: skip
    return {line.split("=")[1].strip() for line in ran.stderr.splitlines() if "GOMP_SPINCOUNT" in line}


def torchs_openmp() -> str:
    """Path of the OpenMP library that PyTorch brings."""
    spec = find_spec("torch")
    assert spec is not None and spec.origin
    folder = Path(spec.origin).parent
    (path,) = [*folder.glob("lib/libgomp*.so*"), *folder.parent.glob("torch.libs/libgomp*.so*")]
    return str(path)


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch brings GNU's OpenMP on Linux only")
@pytest.mark.parametrize(
    "module", ["train.stage", "eval.workspace", "data.packed.batch", "serving_export.server.engine"]
)
def test_threads_spin_briefly(module: str) -> None:
    assert openmp_settings(f"import {module}, torch") == {f"'{SPINS}'"}


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch brings GNU's OpenMP on Linux only")
def test_what_the_environment_says_stays() -> None:
    """With the library alone: PyTorch takes a second to import."""
    code = f"from recipes import openmp; openmp.limit_spinning(); import ctypes; ctypes.CDLL({torchs_openmp()!r})"
    assert openmp_settings(code) == {f"'{SPINS}'"}
    assert openmp_settings(code, GOMP_SPINCOUNT="77") == {"'77'"}
    assert openmp_settings(code, OMP_WAIT_POLICY="PASSIVE") == {"'0'"}
    assert openmp_settings(code, OMP_WAIT_POLICY="ACTIVE") == {"'30000000000'"}
