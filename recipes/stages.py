"""The stages of the pipeline: the module that runs a recipe of each stage, and how it is launched."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

LAUNCHER = "train.launch"
"""The module that starts several ranks of a stage."""


@dataclass(frozen=True)
class EntryPoint:
    """The module of a stage. A `distributed` one may run as several ranks, one process per device."""

    module: str
    distributed: bool = False

    def command(self, recipe_path: str, ranks: int = 1) -> str:
        """The command that runs a recipe of this stage, as a user types it."""
        launcher = f"{LAUNCHER} --nproc-per-node {ranks} -m " if ranks > 1 else ""
        return f"python -m {launcher}{self.module} {recipe_path}"


# The schema of a stage is the Section of its module whose `stage` is this name (tests/recipes/test_recipe_files.py).
STAGES: dict[str, EntryPoint] = {
    "data": EntryPoint("data.prepare"),
    "feedback": EntryPoint("data.feedback"),
    "pretrain": EntryPoint("train.pretrain", distributed=True),
    "sft": EntryPoint("train.sft", distributed=True),
    "engagement": EntryPoint("train.engagement", distributed=True),
    "dpo": EntryPoint("train.dpo", distributed=True),
    "eval": EntryPoint("eval.run"),
    "ablation": EntryPoint("eval.ablation"),
    "export": EntryPoint("serving_export.export"),
}


def entry_module(name: str) -> ModuleType:
    """Import what `python -m name` runs: the module of this name, or the `__main__` of a package."""
    module = importlib.import_module(name)
    return importlib.import_module(f"{name}.__main__") if hasattr(module, "__path__") else module
