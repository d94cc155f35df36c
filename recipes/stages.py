"""The stages of a model's life: which module runs a recipe of each stage, and how it is launched."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """An entry point. `distributed` ones are launched by torchrun, one process a device."""

    module: str
    distributed: bool = False

    def command(self, recipe_path: str) -> str:
        """What a user types to run a recipe of this stage."""
        launcher = "torchrun --standalone -m" if self.distributed else "python -m"
        return f"{launcher} {self.module} {recipe_path}"


# The schema of a stage is the Section of its module whose `stage` is this name (tests/recipes/test_recipe_files.py).
STAGES: dict[str, Stage] = {
    "data": Stage("data.prepare"),
    "feedback": Stage("data.feedback"),
    "pretrain": Stage("train.pretrain", distributed=True),
    "sft": Stage("train.sft", distributed=True),
    "engagement": Stage("train.engagement", distributed=True),
    "dpo": Stage("train.dpo", distributed=True),
    "eval": Stage("eval.run"),
    "ablation": Stage("eval.ablation"),
    "export": Stage("serving_export.export"),
}
