"""Model configuration: layer kinds, KV sharing, and counts of parameters, FLOPs and KV cache bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

LayerKind = Literal["S", "G"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class NoSharing(_Part):
    """Every layer has its own KV cache."""

    kind: Literal["none"] = "none"


class TailSharing(_Part):
    """The last `n_layers` layers read the cache of the last unshared layer of their kind (as in stock engines)."""

    kind: Literal["tail"]
    n_layers: PositiveInt


class AdjacentSharing(_Part):
    """Each `group` of consecutive layers of a kind shares the cache of its first (CLA, arXiv 2405.12981)."""

    kind: Literal["adjacent"]
    group: Annotated[int, Field(ge=2)]


KVSharing = Annotated[NoSharing | TailSharing | AdjacentSharing, Field(discriminator="kind")]


class ModelConfig(_Part):
    """A decoder with sandwich norms, q/k/v norms, GeGLU and tied embeddings.

    layers: pattern of local (S) and global (G) layers, repeated to `n_layers`; the last layer must be global.
    window: number of keys that a local layer's query attends to, including its own.
    """

    vocab_size: PositiveInt
    d_model: PositiveInt
    n_layers: PositiveInt
    n_heads: PositiveInt
    n_kv_heads: PositiveInt = 1
    d_head: PositiveInt
    d_ff: PositiveInt
    layers: Annotated[str, Field(pattern=r"^[SG]+$")] = "SSSSSG"
    window: PositiveInt = 1024
    kv_sharing: KVSharing = NoSharing()
    rope_theta_local: PositiveFloat = 10_000.0
    rope_theta_global: PositiveFloat = 1_000_000.0
    final_logit_softcap: PositiveFloat | None = None
    norm_eps: PositiveFloat = 1e-6
    max_length: PositiveInt

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        if self.d_head % 2:
            raise ValueError(f"d_head={self.d_head} is odd; rotary embedding rotates pairs, so it must be even")
        if self.layer_kinds[-1] != "G":
            raise ValueError(
                f'layers="{self.layers}" repeated to n_layers={self.n_layers} ends in a local layer; '
                "the last layer must be global (G)"
            )
        if isinstance(self.kv_sharing, TailSharing):
            first_shared = self.n_layers - self.kv_sharing.n_layers
            missing = set(self.layer_kinds[first_shared:]) - set(self.layer_kinds[: max(first_shared, 0)])
            if missing:
                raise ValueError(
                    f"kv_sharing.n_layers={self.kv_sharing.n_layers}: the first {max(first_shared, 0)} layers hold no "
                    f"{' or '.join(sorted(missing))} layer for the tail to read; share fewer layers"
                )
        return self

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """'S' (local window) or 'G' (global) of every layer."""
        pattern = self.layers * math.ceil(self.n_layers / len(self.layers))
        return tuple("S" if letter == "S" else "G" for letter in pattern[: self.n_layers])

    def kv_source(self, layer: int) -> int:
        """The layer whose KV cache `layer` reads; itself when it has its own."""
        kinds = self.layer_kinds
        if isinstance(self.kv_sharing, TailSharing):
            first_shared = self.n_layers - self.kv_sharing.n_layers
            if layer >= first_shared:
                return max(owner for owner in range(first_shared) if kinds[owner] == kinds[layer])
        if isinstance(self.kv_sharing, AdjacentSharing):
            same_kind = [other for other in range(layer + 1) if kinds[other] == kinds[layer]]
            return same_kind[(len(same_kind) - 1) // self.kv_sharing.group * self.kv_sharing.group]
        return layer

    @property
    def kv_layers(self) -> tuple[int, ...]:
        """Layers with a KV cache of their own."""
        return tuple(layer for layer in range(self.n_layers) if self.kv_source(layer) == layer)

    @property
    def n_tail_layers(self) -> int:
        """Final layers without a cache: prefill needs them only for a prompt's last token."""
        return self.kv_sharing.n_layers if isinstance(self.kv_sharing, TailSharing) else 0

    def kv_bytes_per_token(self, bytes_per_element: int = 2) -> int:
        """Cache bytes of one more token, while every layer still attends to the whole context."""
        return 2 * len(self.kv_layers) * self.n_kv_heads * self.d_head * bytes_per_element

    def kv_bytes(self, length: int, bytes_per_element: int = 2) -> int:
        """Cache bytes of a sequence of `length` tokens when local layers keep only their window."""
        held = sum(min(length, self.window) if self.layer_kinds[i] == "S" else length for i in self.kv_layers)
        return 2 * held * self.n_kv_heads * self.d_head * bytes_per_element

    @property
    def n_parameters(self) -> int:
        """Number of trainable parameters, with the tied embedding counted once."""
        query, key = self.n_heads * self.d_head, self.n_kv_heads * self.d_head
        per_layer = 2 * self.d_model * query + 3 * self.d_model * self.d_ff + 4 * self.d_model + self.d_head
        per_owner = 2 * self.d_model * key + self.d_head
        return (self.vocab_size + 1) * self.d_model + self.n_layers * per_layer + len(self.kv_layers) * per_owner

    def training_flops(self, document_lengths: Iterable[int]) -> int:
        """FLOPs that a forward and backward pass over documents of these lengths needs (arXiv 2204.02311, appendix B).

        6 per matrix parameter and token, and per layer 12 * n_heads * d_head per visible (query, key) pair: causal, in
        the same document, and within a local layer's window.
        """
        lengths = list(document_lengths)
        vectors = self.n_layers * (4 * self.d_model + self.d_head) + len(self.kv_layers) * self.d_head + self.d_model
        n_local = self.layer_kinds.count("S")
        pairs = n_local * sum(_visible_pairs(n, self.window) for n in lengths)
        pairs += (self.n_layers - n_local) * sum(_visible_pairs(n, n) for n in lengths)
        return 6 * (self.n_parameters - vectors) * sum(lengths) + 12 * self.n_heads * self.d_head * pairs


def _visible_pairs(length: int, window: int) -> int:
    """Number of (query, key) pairs of a document under causal attention with this window."""
    full = min(length, window)
    return full * (full + 1) // 2 + (length - full) * window
