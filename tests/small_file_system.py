"""A file system of a given size, in a mount namespace of the program's own: what a full disk does to a command.

A program of a test calls `mount`; programs that it starts see the file system, others do not.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000


def _can_mount() -> bool:
    """Whether this machine lets a user make such a namespace."""
    words = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        return subprocess.run(words, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


needs_mount = pytest.mark.skipif(not _can_mount(), reason="no namespace of its own to mount a small file system in")


def mount(directory: str, options: str) -> None:
    """Mount an empty tmpfs there, in a new namespace of this process (which must have one thread)."""
    uid, gid = os.getuid(), os.getgid()
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWUSER | _CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", directory], check=True)


def remount(directory: str, options: str) -> None:
    """Change the size, or make it read-only."""
    subprocess.run(["mount", "-o", f"remount,{options}", directory], check=True)


def run_on_small_file_system(program: Path, text: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a program, which is written first and gets these arguments, from the checkout's root."""
    program.write_text(f"import os, subprocess, sys\nfrom tests.small_file_system import mount, remount\n{text}")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(program), *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**environment, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
