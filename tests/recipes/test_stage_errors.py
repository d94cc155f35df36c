"""An error of the file system is one message with the path, what was found there, and what to do."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import recipes.pipeline
import recipes.sweep
from model.weights import WeightsError, write_tensors
from recipes.files import atomic_file
from recipes.stage_errors import USER_ERROR, describe_os_error, run_entry
from tests.small_file_system import needs_mount, run_on_small_file_system

ON_A_SMALL_DISK = """
disk, recipe = sys.argv[1:]
prepare = [sys.executable, "-m", "data.prepare", recipe]
mount(disk, "size=200k")
full = subprocess.run(prepare, stdout=subprocess.PIPE, text=True)
print(full.stdout, f"rc={full.returncode}", *os.listdir(f"{disk}/data"), sep="\\n")
remount(disk, "size=50m")
print(f"rc={subprocess.run(prepare, stdout=subprocess.DEVNULL).returncode}")
"""


def told(action: object, capsys: pytest.CaptureFixture[str]) -> str:
    assert run_entry(action, "runs/mine") == USER_ERROR  # type: ignore[arg-type]
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_cannot_be_opened_is_named_with_a_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing, file = tmp_path / "missing.yml.j2", tmp_path / "file"
    file.touch()
    for path, words in ((missing, "no such file"), (tmp_path, "a directory, expected a file"), (file / "x", "a file")):
        line = told(lambda path=path: path.read_text(), capsys)
        assert f"{path}: " in line
        assert words in line
        assert "Errno" not in line


def test_a_full_disk_is_told_with_the_file_or_at_least_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill() -> None:
        with open("/dev/full", "w") as file:
            file.write("x" * 100_000)

    def fill_by_numpy() -> None:
        with open("/dev/full", "wb") as file:
            np.zeros(100_000).tofile(file)

    for action in (fill, fill_by_numpy):
        line = told(action, capsys)
        assert "runs/mine: No space left on device; make room, then run the same command again" in line
    copied = OSError(errno.ENOSPC, "No space left on device", "from", None, "to")
    assert describe_os_error(copied, "run").startswith("to: No space left")

    def fill_atomically() -> None:
        with atomic_file(tmp_path / "whole"):
            raise OSError(errno.ENOSPC, "No space left on device")

    assert f"{tmp_path / 'whole'}: No space left on device" in told(fill_atomically, capsys)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_cannot_be_written_name_their_file() -> None:
    with pytest.raises(WeightsError, match=r"/dev/full/model\.safetensors could not be written"):
        write_tensors(Path("/dev/full/model.safetensors"), {"a": torch.zeros(3)})


@needs_mount
@pytest.mark.parametrize("workers", [1, 2])
def test_preparing_data_on_a_full_disk_goes_on_once_there_is_room(tmp_path: Path, workers: int) -> None:
    """Room for the logs' first copy, but not for all that follows."""
    disk, logs = tmp_path / "disk", tmp_path / "logs.jsonl"
    disk.mkdir()
    with logs.open("w") as file:
        for number in range(300):
            said = [f"the cat sat on hill {number} at {turn} and then saw you" for turn in range(8)]
            messages = [
                {"speaker": ("Ann", "Ben")[turn % 2], "text": text, "time": 1.7e9 + turn}
                for turn, text in enumerate(said)
            ]
            file.write(json.dumps({"id": f"c{number}", "character": "Ben", "messages": messages}) + "\n")
    recipe = tmp_path / "data.yaml"
    recipe.write_text(
        f"stage: data\nrun_dir: {disk}/data\nseed: 0\nsources: [{{kind: chat_jsonl, path: {logs}}}]\n"
        "split: {kind: fraction, heldout: 0.1}\ntokenizer: {kind: train, vocab_size: 290, sample_characters: 10000}\n"
        f"row_length: 64\nrows_per_shard: 64\ncontinue_within_seconds: 60\n"
        f"executor: {{kind: local, workers: {workers}}}\n"
    )
    done = run_on_small_file_system(tmp_path / "program.py", ON_A_SMALL_DISK, disk, recipe)
    shutil.rmtree(disk)
    assert done.stdout.split("rc=")[1].startswith("2\n"), done.stdout + done.stderr
    assert "done.json" not in done.stdout
    assert done.stdout.endswith("rc=0\n"), done.stdout + done.stderr
    assert f"{disk}/data" in done.stderr
    assert done.stderr.count("No space left on device; make room, then run the same command again") == 1
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("module", "recipe"), [(recipes.pipeline, "recipes/demo"), (recipes.sweep, "recipes/ablation/mqa.yaml")]
)
def test_a_full_file_system_ends_a_pipeline_and_a_sweep_with_one_message(
    module: Any, recipe: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/demo/log")

    monkeypatch.setattr(module, "plan", full)
    assert module.main([recipe, "--dry-run"]) == USER_ERROR
    assert "runs/demo/log: No space left on device; make room, then run" in capfd.readouterr().err
