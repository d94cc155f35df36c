"""Run the tests that use a GPU and record card, versions and outcome: `make test-gpu`, or `python tests/gpu.py`.

Kernels, attention back ends, fused blocks, page-locked memory; with two or more GPUs also training on two ranks under
NCCL and its watchdog. The record (`tests/gpu_record.json`) is committed; BENCHMARKS.md names its date.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from xml.etree import ElementTree

import torch

ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).with_name("gpu_record.json")
TESTS = ("tests/model", "tests/train/deepspeed/test_host_memory.py", "tests/train/health/test_watchdog.py")
PACKAGES = (
    "torch", "triton", "flash-attn-4", "flash-attn", "quack-kernels", "nvidia-cutlass-dsl", "deepspeed", "transformers",
)  # fmt: skip


def outcomes(report: Path) -> tuple[dict[str, dict[str, int]], list[str], dict[str, int]]:
    """Of a JUnit report: counts of each outcome by test file, failed tests, and the reasons of skipped ones."""
    by_file: dict[str, Counter[str]] = {}
    failed: list[str] = []
    reasons: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = "passed"
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome = child.tag if child.tag == "skipped" else "failed"
            if child.tag == "skipped":
                reasons[child.get("message", "")] += 1
        if outcome == "failed":
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        by_file.setdefault(case.get("classname", ""), Counter())[outcome] += 1
    return {name: dict(counts) for name, counts in sorted(by_file.items())}, failed, dict(reasons)


def installed() -> dict[str, str | None]:
    """The versions of the packages that kernels come from; None where one is missing."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, default=RECORD, help="where the record goes")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("this machine has no GPU that torch can use; make test runs the tests of a CPU", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        code = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *TESTS], cwd=ROOT
        ).returncode
        by_file, failed, reasons = outcomes(report)
    doctor = subprocess.run([sys.executable, "-m", "model.doctor"], cwd=ROOT, capture_output=True, text=True)
    print(doctor.stdout, doctor.stderr)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit or None,
        "cards": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "versions": installed(),
        "exit_codes": {"pytest": code, "model.doctor": doctor.returncode},
        "totals": dict(sum((Counter(counts) for counts in by_file.values()), Counter())),
        "failed": failed,
        "skipped": reasons,
        "tests": by_file,
    }
    arguments.record.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{record['totals']} on {', '.join(record['cards'])}; record: {arguments.record}")
    return code or doctor.returncode


if __name__ == "__main__":
    sys.exit(main())
