"""Slurm by the jobs it is given (commands in its place run them here), Ray for real, failures told once."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data.prepare import main
from tests.fork_server import REAL_LAUNCHES

Contents = Callable[[Path], dict[str, bytes]]
ROOT = Path(__file__).parents[3]
SLURM = {
    # the job array runs at once, one task after the other, and then its id is printed
    "sbatch": """\
#!/bin/bash
script="${@: -1}"
number=$(ls "$SLURM_FOLDER" | wc -l)
cp "$script" "$SLURM_FOLDER/$number.slurm"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
if ! grep -q merge_stats "$script"; then
  for task in $(seq 0 "${last:-0}"); do
    SLURM_ARRAY_TASK_ID=$task RUN_OFFSET=0 SLURM_NODELIST=here bash "$script" >> "$SLURM_FOLDER.log" 2>&1
  done
fi
echo "Submitted batch job $number"
""",
    "srun": """\
#!/bin/bash
while [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done
exec "$@"
""",
    "scontrol": "#!/bin/bash\necho here\n",
    "squeue": "#!/bin/bash\n",
    "scancel": "#!/bin/bash\necho $1 >> $SLURM_FOLDER.cancelled\n",
}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands on PATH; the folder takes the scripts that are submitted."""
    commands, folder = tmp_path / "bin", tmp_path / "jobs"
    commands.mkdir()
    folder.mkdir()
    for name, text in SLURM.items():
        (commands / name).write_text(text)
        (commands / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_FOLDER", str(folder))
    monkeypatch.setattr("data.pipeline.executor._SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setattr("data.pipeline.executor._SECONDS_UNTIL_MISSED", 0.1)
    return folder


SLURM_RECIPE = """executor={kind: slurm, partition: cpu, time: "02:00:00", workers: 2, mem_per_cpu_gb: 3,
  sbatch_args: {account: chat}}"""


def test_slurm_jobs_do_what_local_processes_do(
    recipe_file: Path, tmp_path: Path, slurm: Path, contents: Contents, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(recipe_file), "unit_bytes=2000"]
    assert main([*given, f"run_dir={tmp_path}/local"]) == 0
    assert main([*given, SLURM_RECIPE, "tasks=3"]) == 0
    assert contents(tmp_path / "run") == contents(tmp_path / "local")
    scripts = [path.read_text() for path in sorted(slurm.iterdir(), key=lambda path: int(path.stem))]
    jobs = [script for script in scripts if "merge_stats" not in script]
    names = [next(line for line in job.splitlines() if "job-name" in line).split("=")[1] for job in jobs]
    assert names == [f"dramatis-{stage}" for stage in ("read", "select", "tokenizer", "tokenize", "pack", "merge")]
    assert "#SBATCH --array=0-2%2" in jobs[0]
    assert "#SBATCH --array=0-0%2" in jobs[1]
    for wanted in ("--partition=cpu", "--time=02:00:00", "--mem-per-cpu=3G", "--account=chat", "--cpus-per-task=1"):
        assert f"#SBATCH {wanted}\n" in jobs[0]
    assert f'export PYTHONPATH="{ROOT}:' in jobs[0]
    assert "launch_pickled_pipeline" in jobs[0]


def test_an_error_in_a_slurm_job_is_told(
    recipe_file: Path, tmp_path: Path, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(tmp_path / "chats.jsonl", "a") as file:
        file.write("{broken\n")
    assert main([str(recipe_file), SLURM_RECIPE, "tasks=2"]) == 2
    error = capsys.readouterr().err
    assert "CleanError: source chat_jsonl: 1 of 41 records are bad" in error
    assert "Traceback" not in error
    (slurm.parent / "bin" / "launch_pickled_pipeline").symlink_to("/bin/false")  # jobs die without a word
    command = SLURM_RECIPE.replace("kind: slurm", f"kind: slurm, env_command: 'export PATH={slurm.parent}/bin:$PATH'")
    assert main([str(recipe_file), command, "tasks=2", "max_bad_fraction=0.5"]) == 2
    error = capsys.readouterr().err
    assert "StageError: stage read: 2 of 2 tasks did not end and left no error" in error
    assert main([str(recipe_file), SLURM_RECIPE, "tasks=2", "max_bad_fraction=0.5"]) == 0


def test_ctrl_c_cancels_the_jobs(
    recipe_file: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bin_folder = slurm.parent / "bin"
    (bin_folder / "sbatch").write_text("#!/bin/bash\necho Submitted batch job 77\n")

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("data.pipeline.executor.time.sleep", interrupted)
    assert main([str(recipe_file), SLURM_RECIPE, "tasks=2"]) == 130
    assert Path(f"{slurm}.cancelled").read_text().split() == ["77"]
    assert "run the same command again to continue" in capsys.readouterr().err


ON_RAY = """
import sys
from data.prepare import main

*given, failing = sys.argv[1:]
print("exit codes", main(given), main([*given, *failing.split()]))
"""


def test_ray_tasks_do_what_local_processes_do(recipe_file: Path, tmp_path: Path, contents: Contents) -> None:
    """Also that an error is printed once. In a process of its own, which takes the clusters with it."""
    pytest.importorskip("ray")
    given = [str(recipe_file), "unit_bytes=4000"]
    assert main([*given, f"run_dir={tmp_path}/local"]) == 0
    (tmp_path / "broken.jsonl").write_text((tmp_path / "chats.jsonl").read_text() + "{broken\n")
    (tmp_path / "program.py").write_text(ON_RAY)
    failing = f"run_dir={tmp_path}/failing sources.0.path={tmp_path}/broken.jsonl"
    command = [sys.executable, str(tmp_path / "program.py"), *given, "tasks=2", "executor={kind: ray, workers: 2}"]
    environment = {**os.environ, REAL_LAUNCHES: "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([*command, failing], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0 and ended.stdout.endswith("exit codes 0 2\n"), ended.stdout + ended.stderr
    assert contents(tmp_path / "run") == contents(tmp_path / "local")
    assert ended.stderr.startswith("CleanError: source chat_jsonl: 1 of 41 records are bad")
    assert "Traceback" not in ended.stdout + ended.stderr
    json.loads((tmp_path / "failing.quarantine.jsonl").read_text())
