"""What a rank's training step holds in device memory, counted from the architecture before anything runs.

States are what DeepSpeed 0.19.8 allocates under the configuration of train/deepspeed/engine.py; activations are what a
block keeps for its backward pass, tensor by tensor (train/memory/activations.py). Nothing here is fitted to a
measurement.
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
"""What the loss makes: logits of all positions, of chosen ones (a copy of their hidden states), or one number each."""

WORKSPACE_BYTES = 64 * 2**20
"""cuBLAS: 32 MiB a handle on Hopper, one handle for the forward and one for the backward thread."""


@dataclass(frozen=True)
class ParameterCounts:
    """Elements of every parameter, by the groups the optimizer makes of them."""

    block_matrices: tuple[int, ...]
    others: tuple[int, ...]
    block: int
    """All of the largest block."""
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
    """Bytes of device memory a rank at the moment that needs most, by what they are for."""

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
    """A training run as far as memory is concerned. `tokens`: of one micro-batch of one rank, an upper bound."""

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
        """Bytes a rank holds from the first step to the last: weights, master, gradients, moments."""
        stage, n, size = stage or self.engine.zero_stage, self.counts.total, self.itemsize
        share = math.ceil(n / world_size)
        matrices, others = (math.ceil(sum(x) / world_size) for x in (self.counts.block_matrices, self.counts.others))
        persistent = self._persistent if world_size > 1 else 0
        # ZeRO-1: BF16_Optimizer accumulates the gradients of all parameters; in float32 they are the parameters' .grad
        gradients = 4 * n if stage == 1 else 4 * share
        return {
            "weights": size * (share + persistent) if stage == 3 else size * n,
            "master": 4 * share,
            "gradients": gradients,
            "moments": (4 if self.optimizer == "muon" else 8) * matrices + 8 * others,
        }

    def estimate(self, world_size: int, stage: int | None = None) -> Estimate:
        """The moment that needs most memory: of a training step, or the start, when every rank has whole weights."""
        start = Estimate("start", weights=self.itemsize * self.counts.total, master=4 * max(self.counts.each))
        return max(self.step_estimate(world_size, stage), start, key=lambda moment: moment.total)

    def step_estimate(self, world_size: int, stage: int | None = None) -> Estimate:
        """The fullest moment of a training step: the loss, the last block's backward, a reduction, or the update."""
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
        """Bytes kept from the forward pass when it ends."""
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
        """Elements that ZeRO-3 leaves whole on every rank."""
        return sum(count for count in self.counts.each if count <= self.persistent_elements)

    def _recompute(self, layer: int) -> Recompute:
        return "block" if layer < self.engine.recompute_blocks else self.engine.recompute

    @property
    def _loss_bytes(self) -> int:
        """train/token_logprobs.py at its peak: the next chunk's logits are made while the last chunk's live."""
        config, size = self.config, self.itemsize
        if self.loss == "score":
            return 4 * self.tokens
        chunk = min(self.tokens, max(LOGIT_CHUNK_ELEMENTS // config.vocab_size, 1))
        live = 2 if self.tokens > chunk else 1
        hidden = self.tokens * config.d_model * size * (2 if self.loss == "chosen tokens" else 1)
        return live * chunk * config.vocab_size * size + 4 * self.counts.embedding + hidden

    def _idle(self, stage: int, world_size: int) -> int:
        """Buffers that exist during forward and backward: ZeRO-3's bucket and gathered weights; workspaces."""
        if stage < 3:
            return WORKSPACE_BYTES
        gathered = self._gathered if world_size > 1 else 0  # one rank's partitions are the weights
        return WORKSPACE_BYTES + 4 * self.bucket_elements + self.itemsize * gathered

    @property
    def _gathered(self) -> int:
        """Elements of whole weights that ZeRO-3 holds where the forward pass turns into the backward pass.

        Blocks are gathered whole (leaf modules), and one gather is copied once more. What is used again within the
        reuse distance stays: the last blocks, each passed twice. The tied embedding is needed at both ends.
        """
        counts = self.counts
        live = MAX_REUSE_DISTANCE // 2 + PREFETCH_ELEMENTS + counts.embedding + counts.block
        live = min(live, MAX_LIVE_PARAMETERS + counts.block, counts.total - self._persistent)
        return live + counts.block

    def _backward(self, stage: int, states: dict[str, int], idle: int) -> Estimate:
        """The last block's backward: all the others still keep theirs. The loss left its gradient of the embedding."""
        counts, size = self.counts, self.itemsize
        recompute = self._recompute(self.config.n_layers - 1)
        working = backward_bytes(self.config, self.tokens, size, recompute, self.fused)
        buffers = idle + (self._bucket(stage) if self._has_late_bucket(stage) else 0)
        if size == 2 and not (stage == 1 and self.fused):  # else they are added to the states at once
            buffers += size * counts.block
        return Estimate(
            "backward", **states, activations=self.activations + working,
            logits=0 if self.loss == "score" else size * counts.embedding, buffers=buffers,
        )  # fmt: skip

    def _has_late_bucket(self, stage: int) -> bool:
        """Whether DeepSpeedZeroOptimizer runs, whose bucket exists from a backward's first gradient to its last."""
        return stage == 2 or (stage == 1 and self.itemsize == 4)

    def _bucket(self, stage: int) -> int:
        return self.bucket_elements * (4 if stage == 3 else self.itemsize)

    def _reduction(self, stage: int, states: dict[str, int], idle: int, world_size: int) -> Estimate:
        """A full bucket on its way: copied once in its own precision, once in float32 (ZeRO-2), or once (ZeRO-3).

        Blocks whose gradients filled it keep nothing any more. BF16_Optimizer reduces its gradients in place.
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
        """What the update allocates beside the states."""
        largest, share = max(self.counts.each), math.ceil(self.counts.total / world_size)
        if stage == 1 and self.itemsize == 2:
            if self.optimizer == "adamw":
                return 0
            # gradient, momentum, and the orthogonalised update of one matrix, and pieces of split ones in transit
            return 4 * 6 * max(self.counts.block_matrices)
        norms = 8 * largest  # one gradient in float64
        return max(norms, 4 * min(share, SUB_GROUP_ELEMENTS)) if stage == 3 or self.itemsize == 4 else norms

    def host_bytes(self, world_size: int, is_main: bool, pinned: bool = True) -> int:
        """Bytes of host memory a rank's copy of a checkpoint takes (train/deepspeed/snapshot.py), kept for the next
        one.

        PyTorch's pinned allocator rounds every block up to a power of two. Rank 0 also holds the whole weights.
        """
        counts = self.counts
        groups = [(sum(counts.block_matrices), 2 if self.optimizer == "muon" else 3), (sum(counts.others), 3)]
        sizes = []
        for elements, copies in groups:
            share = math.ceil(elements / world_size)
            whole, rest = divmod(share, SUB_GROUP_ELEMENTS) if self.engine.zero_stage == 3 else (0, share)
            sizes += copies * [*whole * [4 * SUB_GROUP_ELEMENTS], 4 * rest]
        if is_main:
            sizes += [self.itemsize * count for count in counts.each]
        return sum(2 ** math.ceil(math.log2(max(size, 1))) if pinned else size for size in sizes)
