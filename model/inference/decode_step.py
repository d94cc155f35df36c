"""One decoding step of a transformer on a GPU, with fixed buffers and no host synchronization, for CUDA graphs.

Kernels of a layer (each starts before the one in front of it ends, and loads weights ahead): product with the stacked
weights of queries, keys and values; norms, rotation and cache write; attention, of parts of the context and their sum;
output product; product of the feed-forward with its gate; its output product. With one row, the sandwich norms are part
of the products; otherwise they are kernels of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from model.config import LayerKind, ModelConfig
from model.rope import rope_tables
from model.transformer import Block, Transformer

if TYPE_CHECKING:
    from model.kernels.decode_product import Tiles
    from model.kernels.decode_vector_product import VectorTiles

WIDEST_HEAD = 128
"""Tiles of wider heads do not fit in shared memory."""
WIDEST_VECTOR = 4096
"""A wider row does not fit in the registers of a program."""

VECTOR_TILE = 32
"""Keys of a tile of attention with one row: small programs run beside those of the products in front and behind."""


def unsupported(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why `DecodeStep` cannot run a model of this dtype on this device, or None."""
    if device.type != "cuda":
        return f"fused decoding needs a CUDA device, not {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"fused decoding computes in bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if not find_spec("triton"):
        return "fused decoding needs Triton, which is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"fused decoding needs compute capability 8.0 or later, not {capability[0]}.{capability[1]}"
    if config.d_head % 8 or config.d_head > WIDEST_HEAD:
        return f"fused decoding needs d_head to be a multiple of 8 and at most {WIDEST_HEAD}, not {config.d_head}"
    widths = {"d_model": config.d_model, "d_ff": config.d_ff}
    odd = [f"{name}={width}" for name, width in widths.items() if width % 8]
    return f"fused decoding needs widths that are multiples of 8, not {' and '.join(odd)}" if odd else None


@dataclass(frozen=True)
class LayerWeights:
    """One layer's weights, stacked as the products read them. w_qkv_XD holds queries only in a layer without cache."""

    kind: LayerKind
    source: int
    w_qkv_XD: Tensor
    w_o_DX: Tensor
    w_gate_in_XD: Tensor
    w_out_DF: Tensor
    attention_norm_in_D: Tensor
    attention_norm_out_D: Tensor
    ff_norm_in_D: Tensor
    ff_norm_out_D: Tensor
    q_norm_K: Tensor
    k_norm_K: Tensor | None


class DecodeWeights:
    """Weights of a transformer for `DecodeStep`, shared by the steps of all batch sizes, and RoPE of all positions.

    Matrices that one product reads become one tensor. The model's parameters are re-pointed to views of it, so that
    none is held twice: a model whose parameters are replaced afterwards needs new DecodeWeights.
    """

    def __init__(self, model: Transformer, max_length: int):
        config = self.config = model.config
        self.embed_VD = model.embed_tokens.weight.detach()
        # rounded as Embedding does
        self.embed_scale = float(torch.tensor(model.embed_tokens.scale, dtype=self.embed_VD.dtype, device="cpu"))
        self.final_norm_D = model.final_norm.weight.detach()
        self.layers = [self._layer(config, layer, cast(Block, block)) for layer, block in enumerate(model.blocks)]
        positions_L = torch.arange(max_length, device=self.embed_VD.device)
        thetas = {"S": config.rope_theta_local, "G": config.rope_theta_global}
        self.max_length = max_length
        self.rope_LC = {kind: rope_tables(positions_L, config.d_head, thetas[kind]) for kind in set(config.layer_kinds)}

    @staticmethod
    def _layer(config: ModelConfig, layer: int, block: Block) -> LayerWeights:
        attention, feed_forward = block.attention, block.feed_forward
        projections = [attention.w_q] + ([attention.w_k, attention.w_v] if attention.owns_cache else [])
        return LayerWeights(
            kind=config.layer_kinds[layer],
            source=config.kv_source(layer),
            w_qkv_XD=_stacked([projection.weight for projection in projections]),
            w_o_DX=attention.w_o.weight.detach(),
            w_gate_in_XD=_stacked([feed_forward.w_gate.weight, feed_forward.w_in.weight]),
            w_out_DF=feed_forward.w_out.weight.detach(),
            attention_norm_in_D=block.attention_norm_in.weight.detach(),
            attention_norm_out_D=block.attention_norm_out.weight.detach(),
            ff_norm_in_D=block.ff_norm_in.weight.detach(),
            ff_norm_out_D=block.ff_norm_out.weight.detach(),
            q_norm_K=attention.q_norm.weight.detach(),
            k_norm_K=attention.k_norm.weight.detach() if attention.owns_cache else None,
        )


def _stacked(parameters: Sequence[Tensor]) -> Tensor:
    """The matrices below one another in one tensor, of which the parameters become views."""
    stacked_XD = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, view_XD in zip(parameters, stacked_XD.split([len(parameter) for parameter in parameters])):
        parameter.data = view_XD
    return stacked_XD


class DecodeStep:
    """The step of up to `rows` sequences, with buffers of its own. Steps that share pools run one after another.

    k_pools, v_pools: slots (S, G, K) of each cache-owning layer. width: columns of a page table. deterministic: the
    bits of a row depend neither on `rows` nor on the other rows.
    """

    def __init__(
        self,
        model: Transformer,
        k_pools: Mapping[int, Tensor],
        v_pools: Mapping[int, Tensor],
        page_size: int,
        *,
        rows: int,
        width: int,
        max_length: int,
        deterministic: bool = False,
        weights: DecodeWeights | None = None,
    ):
        from model.kernels.decode_plan import DecodePlan
        from model.kernels.decode_product_tiles import product_tiles, vector_tiles

        config = model.config
        self.config, self.rows, self.width, self.page_size = config, rows, width, page_size
        self.weights = weights or DecodeWeights(model, max_length)
        assert self.weights.max_length >= max_length
        self.k_pools, self.v_pools = dict(k_pools), dict(v_pools)
        dtype, device = self.weights.embed_VD.dtype, self.weights.embed_VD.device
        self.is_vector = rows == 1 and not deterministic and config.d_model <= WIDEST_VECTOR
        self.plans = {
            str(kind): DecodePlan(
                rows, config.n_heads, config.n_kv_heads, config.d_head, max_length,
                config.window if kind == "S" else None, deterministic, dtype,
                tile=VECTOR_TILE if self.is_vector else None, device=device,
            )
            for kind in sorted(set(config.layer_kinds))
        }  # fmt: skip
        d_model, d_ff = config.d_model, config.d_ff
        d_queries, d_keys = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
        shapes = {
            "qkv": (d_queries + 2 * d_keys, d_model),
            "q": (d_queries, d_model),
            "o": (d_model, d_queries),
            "gate_in": (d_ff, d_model),
            "out": (d_model, d_ff),
            "logits": (config.vocab_size, d_model),
        }
        self.tiles: dict[str, Tiles | None] = {}
        self.vector_tiles: dict[str, VectorTiles] = {}
        if self.is_vector:
            self.vector_tiles = {name: vector_tiles(name, *shape, device) for name, shape in shapes.items()}
        else:
            self.tiles = {
                name: product_tiles(name, rows, *shape, deterministic, device) for name, shape in shapes.items()
            }

        def parts(name: str) -> Tensor:
            tiles = None if self.is_vector else self.tiles[name]
            part_dtype = dtype if tiles is None and not self.is_vector else torch.float32
            return torch.empty(tiles.splits if tiles else 1, rows, shapes[name][0], dtype=part_dtype, device=device)

        self.x_BD, self.x_other_BD, self.normed_BD = (
            torch.empty(rows, d_model, dtype=dtype, device=device) for _ in range(3)
        )
        self.parts = {name: parts(name) for name in ("qkv", "q", "o", "out")}
        self.q_BHK, self.attended_BHK = (
            torch.empty(rows, config.n_heads, config.d_head, dtype=dtype, device=device) for _ in range(2)
        )
        self.gated_BF = torch.empty(rows, d_ff, dtype=dtype, device=device)
        self.logits_BV = torch.empty(rows, config.vocab_size, device=device)

    @torch.no_grad()
    def __call__(self, tokens_B: Tensor, lengths_B: Tensor, page_tables: Mapping[str, Tensor] | Tensor) -> Tensor:
        """Append one token to each sequence; return the float32 logits_BV that follow, in a buffer of this step.

        tokens_B, lengths_B: int32 on the device. Lengths include the new token; a row of length 0 reads and writes no
        cache, and its logits are finite. page_tables: int32 (B, P) of each layer kind, or one for all.
        """
        assert tokens_B.shape == lengths_B.shape == (self.rows,)
        assert tokens_B.dtype == lengths_B.dtype == torch.int32
        tables = dict.fromkeys(self.plans, page_tables) if isinstance(page_tables, Tensor) else page_tables
        assert all(tables[kind].shape == (self.rows, self.width) for kind in self.plans)
        for plan in self.plans.values():
            plan.update(lengths_B)
        if self.is_vector:
            return self._vector_step(tokens_B, lengths_B, tables)
        from model.kernels.decode_norm import embed

        weights = self.weights
        embed(
            tokens_B, lengths_B, weights.embed_VD, weights.embed_scale, self.x_BD,
            weights.layers[0].attention_norm_in_D, self.normed_BD, self.config.norm_eps,
        )  # fmt: skip
        return self._matrix_layers(0, lengths_B, tables)

    @torch.no_grad()
    def finish(
        self, x_BD: Tensor, first_layer: int, lengths_B: Tensor, page_tables: Mapping[str, Tensor] | Tensor
    ) -> Tensor:
        """float32 logits_BV behind the newest tokens, from x_BD after the layers before `first_layer`.

        For prompts, whose tail layers are computed for the last token only. Otherwise as `__call__`, for more than one
        row or a deterministic step.
        """
        from model.kernels.norm import add_norm

        assert not self.is_vector
        tables = dict.fromkeys(self.plans, page_tables) if isinstance(page_tables, Tensor) else page_tables
        for plan in self.plans.values():
            plan.update(lengths_B)
        norms_D = [layer.attention_norm_in_D for layer in self.weights.layers] + [self.weights.final_norm_D]
        self.x_BD.copy_(x_BD)
        normed_BD = add_norm(self.x_BD, None, None, norms_D[first_layer], self.config.norm_eps)[1]
        assert normed_BD is not None
        self.normed_BD.copy_(normed_BD)
        return self._matrix_layers(first_layer, lengths_B, tables)

    def _matrix_layers(self, first_layer: int, lengths_B: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        from model.kernels.decode_norm import add_norm_of_parts
        from model.kernels.decode_product import product

        weights, tiles, eps = self.weights, self.tiles, self.config.norm_eps
        layers = weights.layers
        norms_behind = [layer.attention_norm_in_D for layer in layers[1:]] + [weights.final_norm_D]
        for layer, norm_behind_D in [*zip(layers, norms_behind, strict=True)][first_layer:]:
            name = "qkv" if layer.k_norm_K is not None else "q"
            product(self.normed_BD, layer.w_qkv_XD, self.parts[name], tiles[name])
            self._attend(layer, self.parts[name], lengths_B, tables[layer.kind])
            product(self.attended_BHK.flatten(1), layer.w_o_DX, self.parts["o"], tiles["o"])
            add_norm_of_parts(
                self.x_BD, self.parts["o"], layer.attention_norm_out_D, layer.ff_norm_in_D, self.normed_BD, eps
            )
            product(self.normed_BD, layer.w_gate_in_XD, self.gated_BF[None], tiles["gate_in"], gated=True)
            product(self.gated_BF, layer.w_out_DF, self.parts["out"], tiles["out"])
            add_norm_of_parts(self.x_BD, self.parts["out"], layer.ff_norm_out_D, norm_behind_D, self.normed_BD, eps)
        cap = self.config.final_logit_softcap or 0.0
        product(self.normed_BD, weights.embed_VD, self.logits_BV[None], tiles["logits"], cap=cap)
        return self.logits_BV

    def _vector_step(self, tokens_B: Tensor, lengths_B: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        from model.kernels.decode_norm import embed
        from model.kernels.decode_vector_product import SandwichNorm, vector_product

        weights, tiles, eps = self.weights, self.vector_tiles, self.config.norm_eps
        x_D, x_other_D = self.x_BD[0], self.x_other_BD[0]
        o_D, out_D = self.parts["o"][0, 0], self.parts["out"][0, 0]
        embed(tokens_B, lengths_B, weights.embed_VD, weights.embed_scale, self.x_BD)
        ff_norm_out_D = None
        for layer in weights.layers:
            name = "qkv" if layer.k_norm_K is not None else "q"
            norm = SandwichNorm(x_D, layer.attention_norm_in_D, eps)
            if ff_norm_out_D is not None:
                norm = SandwichNorm(x_D, layer.attention_norm_in_D, eps, out_D, ff_norm_out_D, x_other_D)
                x_D, x_other_D = x_other_D, x_D
            vector_product(norm, layer.w_qkv_XD, self.parts[name][0, 0], tiles[name])
            self._attend(layer, self.parts[name], lengths_B, tables[layer.kind])
            vector_product(self.attended_BHK.view(-1), layer.w_o_DX, o_D, tiles["o"])
            norm = SandwichNorm(x_D, layer.ff_norm_in_D, eps, o_D, layer.attention_norm_out_D, x_other_D)
            x_D, x_other_D = x_other_D, x_D
            vector_product(norm, layer.w_gate_in_XD, self.gated_BF[0], tiles["gate_in"], gated=True)
            vector_product(self.gated_BF[0], layer.w_out_DF, out_D, tiles["out"])
            ff_norm_out_D = layer.ff_norm_out_D
        norm = SandwichNorm(x_D, weights.final_norm_D, eps, out_D, ff_norm_out_D, x_other_D)
        cap = self.config.final_logit_softcap or 0.0
        vector_product(norm, weights.embed_VD, self.logits_BV[0], tiles["logits"], cap=cap)
        return self.logits_BV

    def _attend(self, layer: LayerWeights, parts_SBX: Tensor, lengths_B: Tensor, table_BP: Tensor) -> None:
        from model.kernels.decode_attention import decode_attention
        from model.kernels.decode_rotary import rotary_write

        k_SGK, v_SGK = self.k_pools[layer.source], self.v_pools[layer.source]
        rotary_write(
            parts_SBX, layer.q_norm_K, layer.k_norm_K, self.weights.rope_LC[layer.kind], lengths_B, table_BP,
            self.page_size, self.q_BHK, k_SGK, v_SGK, self.config.norm_eps,
        )  # fmt: skip
        decode_attention(
            self.q_BHK, k_SGK, v_SGK, table_BP, self.page_size, self.plans[layer.kind], out_BHK=self.attended_BHK
        )
