"""Check which attention back ends and kernels run on this machine: `python -m model.doctor`.

Each is compared with its reference, forward and backward. Exit code 0: everything that runs here is correct; 1:
something fails or gives wrong results; 130: Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from model.obstacle import INSTALL_GPU, Obstacle, failure
from recipes.interrupt import exit_on_interrupt

if TYPE_CHECKING:
    import torch

    from model.doctor.checks import Check

CONSTRAINTS = Path(__file__).parents[2] / "constraints-gpu.txt"
KERNEL_PACKAGES = ("torch", "triton", "flash-attn-4", "quack-kernels", "nvidia-cutlass-dsl", "apache-tvm-ffi")
_MOST_WORDS = 2000
_COLORS = {"works": "green", "wrong": "bold red", "broken": "bold red", "missing": "yellow", "unfit": "dim"}
_SHOWN = {"unfit": "not here", "missing": "not installed", "wrong": "WRONG", "broken": "FAILS"}


@dataclass(frozen=True)
class Finding:
    """Result of a check. error: relative to the norm of the reference."""

    check: Check
    state: Literal["works", "wrong", "broken", "missing", "unfit"]
    seconds: float = 0.0
    error: float | None = None
    obstacle: Obstacle | None = None

    @property
    def is_sound(self) -> bool:
        return self.state not in ("wrong", "broken")


def examine(check: Check) -> Finding:
    """Run one check; an exception of any type becomes a finding."""
    began = time.monotonic()
    try:
        obstacle = check.obstacle()
        if obstacle:
            return Finding(check, obstacle.kind, time.monotonic() - began, obstacle=obstacle)
        error = check.run()
    except Exception as raised:  # compilers, drivers and libraries raise their own types
        return Finding(check, "broken", time.monotonic() - began, obstacle=failure(raised))
    seconds = time.monotonic() - began
    if error <= check.bound:
        return Finding(check, "works", seconds, error)
    words = f"its error is {error:.2g} of the norm of {check.reference}; rounding explains at most {check.bound:.2g}"
    cause = "the kernel gives wrong results here: it was not tested with these versions or on this GPU"
    return Finding(check, "wrong", seconds, error, Obstacle("broken", words, cause, INSTALL_GPU))


def pinned_versions(path: Path = CONSTRAINTS) -> dict[str, str]:
    """Package -> version of a constraints file; empty if there is no such file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return dict(line.split("==") for line in lines if re.match(r"[A-Za-z0-9]", line))


def version_table(pinned: dict[str, str]) -> Table:
    """Installed and tested versions of the packages that provide kernels."""
    table = Table("package", "installed", "tested (constraints-gpu.txt)", title="versions", title_justify="left")
    for name in KERNEL_PACKAGES:
        try:
            installed = version(name)
        except PackageNotFoundError:
            installed = "none"
        tried = pinned.get(name, "")
        color = "green" if installed.partition("+")[0] == tried else "yellow"
        table.add_row(name, f"[{color}]{installed}[/]", tried)
    return table


def machine() -> str:
    """One line about Python, torch, CUDA and the GPU."""
    import torch

    parts = [f"Python {sys.version.split()[0]}", f"torch {torch.__version__}"]
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        parts.append(f"CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}, compute capability {major}.{minor}")
    elif torch.version.cuda is None:
        parts.append("built without CUDA" + (", but a GPU driver is installed" if _has_driver() else ""))
    else:
        parts.append(f"CUDA {torch.version.cuda}, which finds no GPU")
    return ", ".join(parts)


def unusable_gpu() -> Obstacle | None:
    """Why torch does not use the GPU although its driver is installed; None if it does, or there is no driver."""
    import torch

    if torch.cuda.is_available() or not _has_driver():
        return None
    if torch.version.cuda is None:
        cause = "this torch is a build for CPUs"
        return Obstacle("broken", f"torch {torch.__version__} was built without CUDA", cause, INSTALL_GPU)
    try:
        torch.cuda.init()
    except Exception as error:
        return failure(error)
    return Obstacle("broken", "torch finds no GPU", "CUDA_VISIBLE_DEVICES or a container may hide it")


def _has_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists()


def findings_table(findings: Sequence[Finding]) -> Table:
    """A row for each check."""
    table = Table(title="each against its reference, forward and backward", title_justify="left")
    for name in ("part", "state", "error (at most)"):
        table.add_column(name, no_wrap=True)
    table.add_column("s", justify="right", no_wrap=True)
    table.add_column("reference")
    for finding in findings:
        ran = finding.error is not None
        table.add_row(
            finding.check.part,
            f"[{_COLORS[finding.state]}]{_SHOWN.get(finding.state, finding.state)}[/]",
            f"{finding.error:.1e} ({finding.check.bound:.0e})" if ran else "",
            f"{finding.seconds:.0f}",
            finding.check.reference if ran else "",
        )
    return table


def explain(name: str, obstacle: Obstacle) -> str:
    """The original error, its cause, and what to do."""
    words = obstacle.words
    if len(words) > _MOST_WORDS:
        words = f"{words[: _MOST_WORDS // 2]}\n[...]\n{words[-_MOST_WORDS // 2 :]}"
    lines = [f"[bold]{escape(name)}[/]: {escape(words)}"]
    if obstacle.cause:
        lines.append(f"  cause:   {escape(obstacle.cause)}")
    if obstacle.remedy:
        lines.append(f"  install: {escape(obstacle.remedy)}")
    return "\n".join(lines)


def taken(device: torch.device) -> str:
    """What `attention: auto` and `engine.blocks: auto` choose on this device (with bfloat16 on a GPU)."""
    import torch

    from model.attention_ops import choose_backend
    from model.execution import why_not_fused

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    blocks = "plain" if why_not_fused(device) else "fused"
    return f"attention {choose_backend('auto', device, dtype)}, {blocks} blocks; slower back ends are not needed"


def diagnose(console: Console) -> int:
    """Check everything and print the findings; the exit code."""
    import torch

    from model.doctor.checks import all_checks

    console.print(machine(), highlight=False, markup=False, soft_wrap=True)
    console.print(version_table(pinned_versions()))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    findings: list[Finding] = []
    for check in all_checks(device, os.environ.get("TRITON_INTERPRET") == "1"):
        with console.status(f"{check.part} ..."):
            findings.append(examine(check))
    console.print(findings_table(findings))
    gpu = unusable_gpu()
    if gpu:
        console.print(explain("GPU", gpu), highlight=False, soft_wrap=True)
    obstacles = dict.fromkeys(finding.obstacle for finding in findings if finding.obstacle)
    for obstacle in obstacles:
        alike = [finding.check.part for finding in findings if finding.obstacle == obstacle]
        console.print(explain(", ".join(alike), obstacle), highlight=False, soft_wrap=True)
    console.print(f"training uses {taken(device)}", highlight=False)
    unsound = [finding.check.part for finding in findings if not finding.is_sound] + ["GPU"] * (gpu is not None)
    n_works = sum(finding.state == "works" for finding in findings)
    if unsound:
        console.print(f"[bold red]broken: {', '.join(unsound)}[/]; {n_works} work", highlight=False, soft_wrap=True)
    else:
        console.print(f"[green]everything that runs here is correct ({n_works} parts)[/]", highlight=False)
    return 1 if unsound else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    return diagnose(Console())


if __name__ == "__main__":
    exit_on_interrupt()  # an interrupted import or check is neither sound nor missing
    sys.exit(main())
