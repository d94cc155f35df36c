"""OpenMP threads spin only briefly in every process of ours that loads PyTorch, unless the environment differs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.openmp import SPINS

ROOT = Path(__file__).parents[2]


def openmp_settings(module: str, **variables: str) -> set[str]:
    """What each OpenMP library that is loaded with `module` says of its spins, in a new process."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    ran = subprocess.run(
        [sys.executable, "-c", f"import {module}, torch"], cwd=ROOT, capture_output=True, text=True, check=True,
        env={**environment, "OMP_DISPLAY_ENV": "VERBOSE", **variables},
    )  # fmt: skip
    return {line.split("=")[1].strip() for line in ran.stderr.splitlines() if "GOMP_SPINCOUNT" in line}


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch brings GNU's OpenMP on Linux only")
@pytest.mark.parametrize(
    "module", ["train.stage", "eval.workspace", "data.packed.batch", "serving_export.server.engine"]
)
def test_threads_spin_briefly(module: str) -> None:
    assert openmp_settings(module) == {f"'{SPINS}'"}


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch brings GNU's OpenMP on Linux only")
def test_what_the_environment_says_stays() -> None:
    assert openmp_settings("data.packed.batch", GOMP_SPINCOUNT="77") == {"'77'"}
    assert openmp_settings("data.packed.batch", OMP_WAIT_POLICY="PASSIVE") == {"'0'"}
    assert openmp_settings("data.packed.batch", OMP_WAIT_POLICY="ACTIVE") == {"'30000000000'"}
