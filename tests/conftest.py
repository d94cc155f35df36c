"""One thread a process. Nothing asserts how long something takes: hypothesis has no deadline, and repeats examples."""

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small only wait for each other's threads
import torch

from tests import fork_server
from tests.triton_interpreter import patch_once_a_launch

settings.register_profile("dramatis", deadline=None, derandomize=True)
settings.load_profile("dramatis")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: its kernels run on the CPU, slowly
    patch_once_a_launch()
    if sys.platform == "linux" and not os.environ.get(fork_server.REAL_LAUNCHES):
        fork_server.install()  # a fork of a process that has initialized CUDA cannot use it


@pytest.fixture(scope="session")
def make_feedback_log() -> Callable[..., Any]:
    """`make_log` of tests/data/synthetic_feedback.py: tests cannot import each other."""
    path = Path(__file__).parent / "data" / "synthetic_feedback.py"
    spec = importlib.util.spec_from_file_location("synthetic_feedback", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.make_log
