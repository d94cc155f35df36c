"""Estimate of a rank's device memory, counted from the architecture before anything runs.

States are what DeepSpeed 0.19.8 allocates with the configuration of train/deepspeed/engine.py; activations are what
blocks keep for the backward pass (train/memory/activations.py). Nothing is fitted to measurements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from model.config import ModelConfig
from model.execution import Recompute
from model.transformer import Transformer
from train.deepspeed.engine import (
    BUCKET_ELEMENTS,
    MAX_LIVE_PARAMETERS,
    MAX_REUSE_DISTANCE,
    PERSISTENT_ELEMENTS,
    PREFETCH_ELEMENTS,
    SUB_GROUP_ELEMENTS,
    EngineConfig,
)
from train.memory.activations import backward_bytes, kept_bytes
from train.optim import parameter_roles
from train.token_logprobs import LOGIT_CHUNK_ELEMENTS

GIB = 2**30
LossKind = Literal["every token", "chosen tokens", "score"]
"""Output of the loss: logits of all positions, of chosen ones (whose hidden states are copied), or one score each."""

WORKSPACE_BYTES = 64 * 2**20
"""cuBLAS: 32 MiB per handle on Hopper, one handle each for the forward and the backward thread."""


@dataclass(frozen=True)
class ParameterCounts:
    """Elements of every parameter, by optimizer group."""

    block_matrices: tuple[int, ...]
    others: tuple[int, ...]
    block: int
    """Parameters of the largest block."""
    embedding: int

    @classmethod
    def of(cls, config: ModelConfig) -> ParameterCounts:
        with torch.device("meta"):
            module = Transformer(config)
        roles = parameter_roles(module)
        return cls(
            tuple(p.numel() for p in roles.block_matrices),
            tuple(p.numel() for p in [*roles.head_matrices, *roles.others]),
            max(sum(p.numel() for p in block.parameters()) for block in module.blocks),
            module.embed_tokens.weight.numel(),
        )

    @property
    def each(self) -> tuple[int, ...]:
        return self.block_matrices + self.others

    @property
    def total(self) -> int:
        return sum(self.each)


@dataclass(frozen=True)
class Estimate:
    """Bytes of a rank's device memory at its peak, by purpose. moment: when the peak occurs."""

    moment: str
    weights: int = 0
    master: int = 0
    gradients: int = 0
    moments: int = 0
    activations: int = 0
    logits: int = 0
    buffers: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        return {name: value for name, value in vars(self).items() if name != "moment"}


@dataclass(frozen=True)
class Load:
    """The settings of a training run that determine its memory. tokens: upper bound for a micro-batch of one rank."""

    config: ModelConfig
    engine: EngineConfig
    optimizer: Literal["adamw", "muon"]
    tokens: int
    loss: LossKind = "every token"
    bucket_elements: int = BUCKET_ELEMENTS["cuda"]
    persistent_elements: int = PERSISTENT_ELEMENTS["cuda"]

    @cached_property
    def counts(self) -> ParameterCounts:
        return ParameterCounts.of(self.config)

    @property
    def itemsize(self) -> int:
        return self.engine.dtype.itemsize

    @property
    def fused(self) -> bool:
        return self.engine.blocks != "plain"

    def states(self, world_size: int, stage: int | None = None) -> dict[str, int]:
        """Bytes a rank holds throughout training: weights, float32 master weights, gradients, moments."""
        stage, n, size = stage or self.engine.zero_stage, self.counts.total, self.itemsize
        share = math.ceil(n / world_size)
        matrices, others = (math.ceil(sum(x) / world_size) for x in (self.counts.block_matrices, self.counts.others))
        persistent = self._persistent if world_size > 1 else 0
        # ZeRO-1: BF16_Optimizer sums gradients of all parameters; in float32 these are the parameters' .grad
        gradients = 4 * n if stage == 1 else 4 * share
        return {
            "weights": size * (share + persistent) if stage == 3 else size * n,
            "master": 4 * share,
            "gradients": gradients,
            "moments": (4 if self.optimizer == "muon" else 8) * matrices + 8 * others,
        }

    def estimate(self, world_size: int, stage: int | None = None) -> Estimate:
        """The peak of a training step, or of the start, when every rank holds all weights."""
        start = Estimate("start", weights=self.itemsize * self.counts.total, master=4 * max(self.counts.each))
        return max(self.step_estimate(world_size, stage), start, key=lambda moment: moment.total)

    def step_estimate(self, world_size: int, stage: int | None = None) -> Estimate:
        """The peak of a training step: at the loss, the last block's backward, a reduction, or the update."""
        stage = stage or self.engine.zero_stage
        states, idle = self.states(world_size, stage), self._idle(stage, world_size)
        moments = [
            Estimate("loss", **states, activations=self.activations, logits=self._loss_bytes, buffers=idle),
            self._backward(stage, states, idle),
            self._reduction(stage, states, idle, world_size),
            Estimate("update", **states, buffers=idle + self._step_bytes(stage, world_size)),
        ]
        return max(moments, key=lambda moment: moment.total)

    @property
    def activations(self) -> int:
        """Bytes kept at the end of the forward pass."""
        config, size = self.config, self.itemsize
        kinds = set(config.layer_kinds)
        blocks = sum(
            kept_bytes(config, layer, self.tokens, size, self._recompute(layer), self.fused)
            for layer in range(config.n_layers)
        )
        # the final norm's input, output and scale, float32 rotary tables of each kind of layer, the batch itself
        ends = self.tokens * (2 * config.d_model * size + 4 + 4 * config.d_head * len(kinds) + 8 + 8 + 4)
        return blocks + ends

    @property
    def _persistent(self) -> int:
        """Elements of parameters that ZeRO-3 does not shard."""
        return sum(count for count in self.counts.each if count <= self.persistent_elements)

    def _recompute(self, layer: int) -> Recompute:
        return "block" if layer < self.engine.recompute_blocks else self.engine.recompute

    @property
    def _loss_bytes(self) -> int:
        """Peak of train/token_logprobs.py: a chunk's logits are computed while the previous chunk's are live."""
        config, size = self.config, self.itemsize
        if self.loss == "score":
            return 4 * self.tokens
        chunk = min(self.tokens, max(LOGIT_CHUNK_ELEMENTS // config.vocab_size, 1))
        live = 2 if self.tokens > chunk else 1
        hidden = self.tokens * config.d_model * size * (2 if self.loss == "chosen tokens" else 1)
        return live * chunk * config.vocab_size * size + 4 * self.counts.embedding + hidden

    def _idle(self, stage: int, world_size: int) -> int:
        """Buffers during forward and backward: ZeRO-3's bucket and gathered weights; workspaces."""
        if stage < 3:
            return WORKSPACE_BYTES
        gathered = self._gathered if world_size > 1 else 0  # one rank's partitions are the weights
        return WORKSPACE_BYTES + 4 * self.bucket_elements + self.itemsize * gathered

    @property
    def _gathered(self) -> int:
        """Elements of gathered weights under ZeRO-3 between forward and backward.

        Blocks are gathered as a whole (leaf modules), and one gather is copied. Weights reused within the reuse
        distance stay gathered: the last blocks, used twice. The tied embedding is used at both ends.
        """
        counts = self.counts
        live = MAX_REUSE_DISTANCE // 2 + PREFETCH_ELEMENTS + counts.embedding + counts.block
        live = min(live, MAX_LIVE_PARAMETERS + counts.block, counts.total - self._persistent)
        return live + counts.block

    def _backward(self, stage: int, states: dict[str, int], idle: int) -> Estimate:
        """The last block's backward: all blocks' activations are live, and the embedding's gradient from the loss."""
        counts, size = self.counts, self.itemsize
        recompute = self._recompute(self.config.n_layers - 1)
        working = backward_bytes(self.config, self.tokens, size, recompute, self.fused)
        buffers = idle + (self._bucket(stage) if self._has_late_bucket(stage) else 0)
        if size == 2 and not (stage == 1 and self.fused):  # otherwise they are added to the states at once
            buffers += size * counts.block
        return Estimate(
            "backward", **states, activations=self.activations + working,
            logits=0 if self.loss == "score" else size * counts.embedding, buffers=buffers,
        )  # fmt: skip

    def _has_late_bucket(self, stage: int) -> bool:
        """Whether DeepSpeedZeroOptimizer runs, whose bucket is allocated during the backward pass."""
        return stage == 2 or (stage == 1 and self.itemsize == 4)

    def _bucket(self, stage: int) -> int:
        return self.bucket_elements * (4 if stage == 3 else self.itemsize)

    def _reduction(self, stage: int, states: dict[str, int], idle: int, world_size: int) -> Estimate:
        """Reduction of a full bucket: copied in its own precision and in float32 (ZeRO-2), or once (ZeRO-3).

        The activations of blocks whose gradients are in the bucket are freed. BF16_Optimizer reduces in place.
        """
        if stage == 1:
            return Estimate("reduction", **states, buffers=idle)
        counts = self.counts
        filled = min(self.bucket_elements, counts.total)
        left = max(0.0, 1 - filled / counts.total)
        copies = filled * (self.itemsize + (4 if self.itemsize == 2 else 0)) if stage == 2 else filled * 4
        received = 4 * math.ceil(filled / world_size) if stage == 3 else 0
        buffers = idle + copies + received + (self._bucket(stage) if stage == 2 else 0)
        return Estimate("reduction", **states, activations=int(self.activations * left), buffers=buffers)

    def _step_bytes(self, stage: int, world_size: int) -> int:
        """Bytes that the update allocates besides the states."""
        largest, share = max(self.counts.each), math.ceil(self.counts.total / world_size)
        if stage == 1 and self.itemsize == 2:
            if self.optimizer == "adamw":
                return 0
            # gradient, momentum and orthogonalized update of one matrix, and pieces of split matrices in transit
            return 4 * 6 * max(self.counts.block_matrices)
        norms = 8 * largest  # one gradient in float64
        return max(norms, 4 * min(share, SUB_GROUP_ELEMENTS)) if stage == 3 or self.itemsize == 4 else norms

    def host_bytes(self, world_size: int, is_main: bool) -> int:
        """Bytes of host memory for a rank's copy of a checkpoint (train/deepspeed/snapshot.py), reused by the next one.

        Rank 0 also copies all weights.
        """
        states = self.states(world_size)
        return states["master"] + states["moments"] + (self.itemsize * self.counts.total if is_main else 0)
