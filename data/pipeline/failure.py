"""How a task that fails on whatever machine tells its error to whoever waits for it."""

import json
import shutil
from pathlib import Path

from data.atomic_file import write_json
from data.clean.records import CleanError
from data.clean.split import SplitError
from data.format.tokenizer import TokenizerError
from data.packed.shards import ShardError
from data.sources.source import SourceError

RECIPE_ERRORS = (SourceError, CleanError, SplitError, TokenizerError, ShardError)
"""What a change of the recipe or of its inputs repairs."""
_FOLDER = "failures"
_BY_NAME = {error.__name__: error for error in RECIPE_ERRORS}


class StageError(RuntimeError):
    """A stage that did not end, through no fault of the recipe; the message says where to look. To be run again."""


def write_failure(logs: Path, rank: int, error: Exception) -> None:
    """Leave the error of a task beside its logs."""
    (logs / _FOLDER).mkdir(parents=True, exist_ok=True)
    write_json(logs / _FOLDER / f"{rank:05d}.json", {"kind": type(error).__name__, "message": str(error)})


def forget_failures(logs: Path) -> None:
    """Before the tasks run again."""
    shutil.rmtree(logs / _FOLDER, ignore_errors=True)


def failure_of(stage: str, logs: Path, n_left: int, n_tasks: int) -> Exception:
    """The error to raise for a stage of which tasks are left: the first one that a task has written, if any."""
    for path in sorted((logs / _FOLDER).glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        if known := _BY_NAME.get(found["kind"]):
            return known(found["message"])
        return StageError(f"stage {stage}: {found['kind']}: {found['message']}; more in {logs}/logs")
    return StageError(
        f"stage {stage}: {n_left} of {n_tasks} tasks did not end and left no error (killed? out of memory or time?); "
        f"see {logs}; run the same command again to continue"
    )
