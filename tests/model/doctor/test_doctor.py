"""The doctor runs what this machine can, and tells failures and wrong results apart from what is not installed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from model.attention_ops import BACKENDS
from model.doctor import __main__ as doctor
from model.doctor import checks as doctor_checks
from model.doctor.__main__ import examine, main, pinned_versions
from model.doctor.checks import Check, all_checks, distance
from model.obstacle import Obstacle

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")


def check(run: Any = lambda: 0.0, obstacle: Obstacle | None = None) -> Check:
    return Check("a kernel", "PyTorch's", lambda: obstacle, run, 0.1)


def fails() -> float:
    raise KeyError("no such key")


def diagnosis(checks: list[Check], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.setattr(doctor_checks, "all_checks", lambda *_: checks)
    monkeypatch.setenv("COLUMNS", "150")
    code = main([])
    return code, capsys.readouterr().out


def test_every_check_that_runs_here_passes() -> None:
    """With Triton's interpreter where there is no GPU; the fused block has a test of its own, and takes long."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    findings = [examine(found) for found in all_checks(device, device.type == "cpu") if found.part != "fused block"]
    assert [finding for finding in findings if not finding.is_sound] == []
    working = {finding.check.part for finding in findings if finding.state == "works"}
    assert "attention sdpa" in working
    if doctor_checks.import_obstacle("triton") is None:
        assert {f"kernel {name}" for name in kernel_names()} <= working


def kernel_names() -> set[str]:
    return {"add_norm", "normed_heads", "geglu", "cross_entropy", "add_rows"}


def test_every_kernel_and_back_end_has_a_check() -> None:
    parts = {found.part for found in all_checks(CPU, False)}
    assert {f"attention {name}" for name in BACKENDS if name != "reference"} <= parts
    files = {path.stem for path in (ROOT / "model" / "kernels").glob("*.py")} - {
        "__init__",
        "launch",
        "decode_plan",  # of decode_attention
        "paged_attention",  # of decode_attention and prefill_attention
        "flash_attention",
        "matrix_product",
        # of generation in CUDA graphs
        "cache_write", "decode_norm", "decode_prefetch", "decode_product", "decode_product_tiles", "decode_rotary",
        "decode_vector_product", "sample",
    }  # fmt: skip
    whole_paths = {"generation in CUDA graphs"}
    assert len(parts - whole_paths) == len(BACKENDS) - 1 + len(files), "a check for each file of kernels"
    assert whole_paths <= parts


def test_without_a_gpu_kernels_are_not_for_this_machine() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    states = {found.part: examine(found).state for found in all_checks(CPU, False) if found.part != "attention sdpa"}
    assert set(states.values()) == {"unfit"}


@pytest.mark.parametrize("wrong", ["output", "gradient", "nan"])
def test_a_wrong_result_is_found(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = BACKENDS["sdpa"]

    def attend(q_THK: Any, k_TGK: Any, v_TGK: Any, documents: Any, window: Any) -> torch.Tensor:
        out_THK = exact(q_THK, k_TGK, v_TGK, documents, None if wrong == "output" else window)
        if wrong == "gradient":  # half of it is lost on the way back
            return out_THK / 2 + out_THK.detach() / 2
        return out_THK * float("nan") if wrong == "nan" else out_THK

    monkeypatch.setitem(BACKENDS, "sdpa", attend)
    finding = next(examine(found) for found in all_checks(CPU, False) if found.part == "attention sdpa")
    assert finding.state == "wrong" and not finding.is_sound
    assert finding.obstacle is not None and "softmax written out" in finding.obstacle.words


def test_a_failure_is_told_in_its_own_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown = diagnosis([check(fails), check()], monkeypatch, capsys)
    assert code == 1
    assert "KeyError: 'no such key'" in shown and "FAILS" in shown and "broken: a kernel" in shown


def test_what_is_not_installed_or_not_for_this_machine_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = Obstacle("missing", "No module named 'x'", "x is not installed", "pip install [x]")
    unfit = Obstacle("unfit", "it needs a GPU")
    code, shown = diagnosis([check(obstacle=missing), check(obstacle=unfit), check()], monkeypatch, capsys)
    assert code == 0
    for text in ("No module named 'x'", "x is not installed", "pip install [x]", "it needs a GPU", "not installed"):
        assert text in shown
    assert re.search(r"works .*0\.0e\+00 \(1e-01\)", shown)


def test_an_obstacle_that_cannot_be_found_out_is_a_failure() -> None:
    def raises() -> Obstacle | None:
        raise RuntimeError("the driver does not answer")

    finding = examine(Check("a kernel", "PyTorch's", raises, lambda: 0.0, 0.1))
    assert finding.state == "broken" and finding.obstacle is not None
    assert finding.obstacle.words == "RuntimeError: the driver does not answer"


def test_a_gpu_that_torch_does_not_use_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor, "_has_driver", lambda: True)
    code, shown = diagnosis([check()], monkeypatch, capsys)
    assert code == 1
    assert "was built without CUDA" in shown and "this torch is a build for CPUs" in shown


def test_a_distance_of_what_is_not_finite_is_infinite() -> None:
    nan, one = torch.tensor([float("nan")]), torch.ones(1)
    assert distance([one, nan], [one, one]) == float("inf")
    assert distance([one], [one]) == 0


def test_nothing_heavy_is_imported_until_it_runs() -> None:
    names = "import sys, model.doctor; print({'torch', 'triton', 'numpy', 'transformers'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", names], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


def test_the_gpu_extra_is_pinned_and_fits_the_tried_set() -> None:
    """Both files of constraints agree but for torch and what it brings; the extra names versions of the GPU's."""
    import tomllib

    gpu, cpu = pinned_versions(), pinned_versions(ROOT / "constraints.txt")
    differ = {name for name in gpu.keys() & cpu.keys() if gpu[name] != cpu[name]}
    assert differ <= {"torch", "setuptools"}
    assert gpu["torch"].startswith("2.11.") and {"triton", "nvidia-cutlass-dsl-libs-cu13"} <= gpu.keys()
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["gpu"]
    for requirement in extra:
        name, _, exact = requirement.partition("==")
        assert gpu[name.partition("[")[0]] == exact, requirement
