"""The checks of model.doctor: each runs one kernel or back end and returns its error against a reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import cast, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from model.attention_ops import BACKENDS, Backend, Documents, choose_backend, why_not
from model.config import ModelConfig, TailSharing
from model.execution import why_not_fused
from model.inference.decode_step import unsupported
from model.inference.generate import Generator
from model.inference.sampling import Sampling
from model.obstacle import Obstacle, import_obstacle
from model.rope import rope_tables, rotate
from model.transformer import Block, Transformer

_EPS = 1e-6
_LENGTHS = [1, 0, 150, 0, 33, 3, 69]
"""Ragged documents in a row of 256: some empty, some longer and some shorter than the window."""


@dataclass(frozen=True)
class Check:
    """obstacle: why it cannot run here. run: error relative to the reference's norm, expected to be at most `bound`."""

    part: str
    reference: str
    obstacle: Callable[[], Obstacle | None]
    run: Callable[[], float]
    bound: float


def all_checks(device: torch.device, interpreted: bool) -> list[Check]:
    """All checks, in printing order. interpreted: run Triton kernels on the CPU in Triton's interpreter."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bound = 0.02 if device.type == "cuda" else 1e-4
    names = [name for name in get_args(Backend) if name not in ("auto", "reference")]
    checks = [
        Check(
            f"attention {name}", "softmax written out", partial(why_not, name, device, dtype),
            partial(attention_error, name, device, dtype), bound,
        )
        for name in names
    ]  # fmt: skip

    def no_triton() -> Obstacle | None:
        return import_obstacle("triton") if interpreted else why_not_fused(device)

    kernels: list[tuple[str, str, Callable[[torch.device], float]]] = [
        ("add_norm", "PyTorch's rms_norm", norm_error),
        ("normed_heads", "rms_norm and rotation", rotary_error),
        ("geglu", "PyTorch's GELU", geglu_error),
        ("cross_entropy", "PyTorch's logsumexp", cross_entropy_error),
        ("add_rows", "PyTorch's sum", add_rows_error),
        ("decode_attention", "softmax written out", decode_attention_error),
        ("prefill_attention", "softmax written out", prefill_attention_error),
    ]
    checks += [Check(f"kernel {name}", what, no_triton, partial(run, device), 1e-3) for name, what, run in kernels]

    def no_gated_product() -> Obstacle | None:
        obstacle = no_triton()
        if obstacle is None:
            from model.kernels.gated_product import why_not_in_one

            obstacle = why_not_in_one(device, dtype)
        return obstacle

    def no_graphs() -> Obstacle | None:
        reason = unsupported(_TINY, dtype, device)
        return None if reason is None else Obstacle("unfit", reason)

    whole = "plain block in float32; 1 is the plain block's own rounding" if device.type == "cuda" else "plain block"
    gated, fused = partial(gated_error, device, dtype), partial(fused_block_error, device, dtype)
    return [
        *checks,
        Check("gated product (quack)", "product, then GELU", no_gated_product, gated, 0.02),
        Check("fused block", whole, no_triton, fused, 1.5 if device.type == "cuda" else 1e-4),
        Check(
            "generation in CUDA graphs", "one pass without a cache", no_graphs, partial(generation_error, dtype), 0.02
        ),
    ]


def distance(found: Iterable[Tensor | None], expected: Iterable[Tensor | None]) -> float:
    """The largest relative error (norm of the difference / norm of the expected) of any pair; inf for NaN."""
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None and theirs is not None and ours.shape == theirs.shape
        exact = theirs.detach().double()
        error = float((ours.detach().double() - exact).norm() / (exact.norm() + 1e-9))
        worst = max(worst, error if error == error else float("inf"))
    return worst


def attention_error(name: str, device: torch.device, dtype: torch.dtype) -> float:
    """Output and gradients on ragged documents, with and without a window, with one and several key heads."""
    # kernels compile for each combination of heads and window, flex also for each size
    heads = [(4, 1, 64)] if name == "flex" else [(8, 1, 128), (4, 2, 64)]
    row_lengths = [sum(_LENGTHS), None] if name == "sdpa" else [sum(_LENGTHS)]
    worst = 0.0
    for (n_heads, n_kv_heads, d_head), window, row_length in product(heads, (None, 37), row_lengths):
        documents = Documents.from_lengths(_LENGTHS, row_length, device)
        generator = torch.Generator().manual_seed(0)
        q_THK, k_TGK, v_TGK, direction_THK = (
            torch.randn(documents.n_tokens, n, d_head, generator=generator).to(device, dtype)
            for n in (n_heads, n_kv_heads, n_kv_heads, n_heads)
        )
        inputs = (q_THK * d_head**-0.5, k_TGK, v_TGK)
        ours = _with_gradients(name, inputs, direction_THK, documents, window)
        exact = [tensor.float() for tensor in (*inputs, direction_THK)]
        worst = max(worst, distance(ours, _with_gradients("reference", exact[:3], exact[3], documents, window)))
    return worst


def _with_gradients(
    name: str, inputs: Sequence[Tensor], direction_THK: Tensor, documents: Documents, window: int | None
) -> tuple[Tensor, ...]:
    q_THK, k_TGK, v_TGK = (tensor.detach().requires_grad_() for tensor in inputs)
    out_THK = BACKENDS[name](q_THK, k_TGK, v_TGK, documents, window)
    gradients = torch.autograd.grad((out_THK * direction_THK).sum(), (q_THK, k_TGK, v_TGK))
    return (out_THK.detach(), *gradients)


def norm_error(device: torch.device) -> float:
    """Norm, addition and norm again: values and gradients, float32."""
    from model.kernels.norm import add_norm, add_norm_backward

    x_TD, u_TD, grad_out_TD, grad_y_TD = _random(device, *[(9, 70)] * 4)
    w_u_D, w_y_D = _random(device, (70,), (70,))
    leaves = [tensor.clone().requires_grad_() for tensor in (x_TD, u_TD, w_u_D, w_y_D)]
    out_TD = leaves[0] + F.rms_norm(leaves[1], (70,), leaves[2], _EPS)
    y_TD = F.rms_norm(out_TD, (70,), leaves[3], _EPS)
    expected = torch.autograd.grad((out_TD * grad_out_TD).sum() + (y_TD * grad_y_TD).sum(), leaves)
    found_TD, found_y_TD, scales = add_norm(x_TD, u_TD, w_u_D, w_y_D, _EPS)
    found = add_norm_backward(grad_out_TD, grad_y_TD, x_TD, u_TD, w_u_D, w_y_D, scales, remakes_y=True)
    assert found.w_u_PD is not None and found.w_y_PD is not None
    return distance(
        (found_TD, found_y_TD, found.y_TD, found.x_TD, found.u_TD, found.w_u_PD.sum(0), found.w_y_PD.sum(0)),
        (out_TD, y_TD, y_TD, *expected),
    )


def rotary_error(device: torch.device) -> float:
    """Norms and rotation of queries and keys: values and gradients, float32."""
    from model.kernels.rotary import normed_heads, normed_heads_backward

    (x_TX,) = _random(device, (19, 5 * 16))
    w_q_K, w_k_K = _random(device, (16,), (16,))
    cos_TC, sin_TC = rope_tables(torch.arange(19, device=device) * 3, 16, 100.0)
    leaves = [tensor.clone().requires_grad_() for tensor in (x_TX, w_q_K, w_k_K)]
    q_THK, k_TGK, v_TGK = leaves[0].unflatten(-1, (-1, 16)).split([3, 1, 1], dim=1)
    expected = (
        rotate(F.rms_norm(q_THK, (16,), leaves[1], _EPS), cos_TC, sin_TC),
        rotate(F.rms_norm(k_TGK, (16,), leaves[2], _EPS), cos_TC, sin_TC),
        F.rms_norm(v_TGK, (16,), None, _EPS),
    )
    q_grad_THK, k_grad_TGK, v_grad_TGK = directions = _random(device, *[tuple(part.shape) for part in expected])
    gradients = torch.autograd.grad(expected, leaves, directions)
    found = normed_heads(x_TX, w_q_K, w_k_K, cos_TC, sin_TC, 3, 1, _EPS)
    x_grad_TX, *sums_PK = normed_heads_backward(
        x_TX, w_q_K, w_k_K, cos_TC, sin_TC, q_grad_THK, k_grad_TGK, v_grad_TGK, _EPS
    )
    return distance((*found, x_grad_TX, *(parts_PK.sum(0) for parts_PK in sums_PK)), (*expected, *gradients))


def geglu_error(device: torch.device) -> float:
    """The gate and its gradient in both layouts, float32."""
    from model.kernels.geglu import geglu, geglu_backward

    gate_in_TX, grad_TF = _random(device, (5, 2050), (5, 1025))
    leaf_TX = gate_in_TX.clone().requires_grad_()
    gate_TF, linear_TF = leaf_TX.chunk(2, dim=1)
    product_TF = F.gelu(gate_TF, approximate="tanh") * linear_TF
    (gradient_TX,) = torch.autograd.grad(product_TF, leaf_TX, grad_TF)
    in_turn_TX = torch.stack(gate_in_TX.chunk(2, dim=1), dim=-1).flatten(1)
    found = [geglu(gate_in_TX), geglu_backward(in_turn_TX, grad_TF.clone(), True, False)]
    found.append(geglu_backward(gate_in_TX.clone(), grad_TF.clone(), False, True))
    return distance(found, (product_TF, gradient_TX, gradient_TX))


def cross_entropy_error(device: torch.device) -> float:
    """Losses with softcap and z-loss and the gradient that overwrites the logits, float32."""
    from model.kernels.cross_entropy import logit_gradient_, logit_statistics, losses_and_gradient_

    logits_CV, weight_C = _random(device, (4, 9000), (4,))
    targets_C = torch.randint(9000, (4,), generator=torch.Generator().manual_seed(0)).to(device)
    leaf_CV = logits_CV.clone().requires_grad_()
    capped_CV = torch.tanh(leaf_CV / 5.0) * 5.0
    normalizer_C = capped_CV.logsumexp(-1)
    logprob_C = capped_CV.gather(-1, targets_C[:, None])[:, 0] - normalizer_C
    loss_C = weight_C * (0.1 * normalizer_C.square() - logprob_C)
    (gradient_CV,) = torch.autograd.grad(loss_C.sum(), leaf_CV, retain_graph=True)
    (other_CV,) = torch.autograd.grad((weight_C * logprob_C + normalizer_C).sum(), leaf_CV)
    found_CV = logits_CV.clone()
    found_C = losses_and_gradient_(found_CV, targets_C, weight_C, 0.1, 5.0)
    statistics = logit_statistics(logits_CV, targets_C, 5.0)
    ones_C = torch.ones_like(weight_C)
    other_found_CV = logit_gradient_(logits_CV.clone(), targets_C, statistics[1], weight_C, ones_C, 5.0)
    return distance(
        (found_C, found_CV, *statistics, other_found_CV), (loss_C, gradient_CV, logprob_C, normalizer_C, other_CV)
    )


def add_rows_error(device: torch.device) -> float:
    """Rows summed into two vectors, float32."""
    from model.kernels.add_rows import add_rows

    totals_D, rows_PD = _random(device, (40,), (40,)), _random(device, (1100, 40), (1100, 40))
    expected = [total_D + part_PD.sum(0) for total_D, part_PD in zip(totals_D, rows_PD, strict=True)]
    add_rows(totals_D, rows_PD)
    return distance(totals_D, expected)


def decode_attention_error(device: torch.device) -> float:
    """One token a sequence over a paged cache, with and without a window, float32."""
    from model.kernels.decode_attention import decode_attention
    from model.kernels.decode_plan import DecodePlan

    cache = _PagedCache(device)
    lengths_B = torch.tensor(cache.lengths, dtype=torch.int32, device=device)
    q_BHK = cache.q_THK[lengths_B.cumsum(0) - 1]
    worst = 0.0
    for window in (None, 37):
        plan = DecodePlan(len(q_BHK), 4, 1, 64, 256, window, cache_dtype=torch.float32, device=device)
        plan.update(lengths_B)
        found_BHK = decode_attention(q_BHK, cache.k_SGK, cache.v_SGK, cache.table_BP, cache.page, plan)
        worst = max(worst, distance([found_BHK], [cache.expected_THK(window)[lengths_B.cumsum(0) - 1]]))
    return worst


def prefill_attention_error(device: torch.device) -> float:
    """All tokens of each sequence over a paged cache, with and without a window, float32."""
    from model.kernels.prefill_attention import prefill_attention

    cache = _PagedCache(device)
    lengths_B = torch.tensor(cache.lengths, dtype=torch.int32, device=device)
    starts_B1 = F.pad(lengths_B.cumsum(0), (1, 0)).int()
    found = [
        prefill_attention(
            cache.q_THK, cache.k_SGK, cache.v_SGK, cache.table_BP, cache.page, starts_B1, lengths_B, window
        )
        for window in (None, 37)
    ]
    return distance(found, [cache.expected_THK(window) for window in (None, 37)])


class _PagedCache:
    """Keys and values of some sequences in pages of random order, and queries at all of their positions."""

    def __init__(self, device: torch.device) -> None:
        self.page, self.lengths = 16, [n for n in _LENGTHS if n]
        n_pages = [-(-n // self.page) for n in self.lengths]
        order = iter(torch.randperm(sum(n_pages), generator=torch.Generator().manual_seed(0)).tolist())
        self.table_BP = torch.zeros(len(n_pages), max(n_pages), dtype=torch.int32)
        for row_P, n in zip(self.table_BP, n_pages, strict=True):
            row_P[:n] = torch.tensor([next(order) for _ in range(n)])
        self.table_BP = self.table_BP.to(device)
        n_tokens = sum(self.lengths)
        self.q_THK, self.k_TGK, self.v_TGK = _random(device, (n_tokens, 4, 64), (n_tokens, 1, 64), (n_tokens, 1, 64))
        self.q_THK /= 8
        slots = [
            self.table_BP[b, place // self.page] * self.page + place % self.page
            for b, n in enumerate(self.lengths)
            for place in range(n)
        ]
        self.k_SGK = torch.full((sum(n_pages) * self.page, 1, 64), float("nan"), device=device)
        self.v_SGK = self.k_SGK.clone()
        self.k_SGK[torch.stack(slots).long()], self.v_SGK[torch.stack(slots).long()] = self.k_TGK, self.v_TGK

    def expected_THK(self, window: int | None) -> Tensor:
        """Causal attention of every token within its sequence."""
        documents = Documents.from_lengths(self.lengths, device=self.q_THK.device)
        return BACKENDS["reference"](self.q_THK, self.k_TGK, self.v_TGK, documents, window)


def gated_error(device: torch.device, dtype: torch.dtype) -> float:
    """The fused product and gate, on sizes that are not multiples of a tile."""
    from model.kernels.gated_product import gated_product

    x_TD, w_gate_in_XD = (tensor.to(dtype) for tensor in _random(device, (513, 256), (592, 256)))
    both_TX = F.linear(x_TD.double(), w_gate_in_XD.double() / 16)
    gate_TF, linear_TF = both_TX.chunk(2, dim=1)
    _, _, product_TF = gated_product(x_TD, w_gate_in_XD / 16)
    return distance([product_TF], [F.gelu(gate_TF, approximate="tanh") * linear_TF])


def fused_block_error(device: torch.device, dtype: torch.dtype) -> float:
    """Hidden states and all gradients of a small decoder. In 16 bits: error relative to that of plain blocks."""
    n_heads, d_head, d_ff = (2, 64, 256) if device.type == "cuda" else (2, 4, 16)  # the interpreter is slow
    config = ModelConfig(
        vocab_size=128, d_model=n_heads * d_head, n_layers=4, n_heads=n_heads, n_kv_heads=1, d_head=d_head, d_ff=d_ff,
        layers="SG", window=37, kv_sharing=TailSharing(kind="tail", n_layers=2), max_length=256,
    )  # fmt: skip
    attention = choose_backend("auto", device, dtype)
    exact = _decoder_outputs(config, device, torch.float32, "sdpa", fused=False)
    fused = _decoder_outputs(config, device, dtype, attention, fused=True)
    if dtype == torch.float32:
        return distance(fused, exact)
    plain = _decoder_outputs(config, device, dtype, attention, fused=False)
    ours, theirs = (
        [distance([tensor], [right]) for tensor, right in zip(found, exact, strict=True)] for found in (fused, plain)
    )
    return sum(ours) / sum(theirs)


def _decoder_outputs(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, attention: str, fused: bool
) -> list[Tensor]:
    """Hidden states and gradients of all parameters, with the same weights (rounded to 16 bits) for any dtype."""
    model = Transformer(config, "sdpa", seed=1).to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    model.to(dtype)
    model.attention_backend = attention  # type: ignore[assignment]
    for module in model.blocks:
        block = cast(Block, module)
        block.fused, block.recompute = fused, "elementwise" if fused else "none"
    lengths = _LENGTHS if device.type == "cuda" else [1, 0, 5]
    documents = Documents.from_lengths(lengths, sum(lengths), device)
    generator = torch.Generator().manual_seed(3)
    tokens_T = torch.randint(1, config.vocab_size, (documents.n_tokens,), generator=generator).to(device)
    direction_TD = torch.randn(documents.n_tokens, config.d_model, generator=generator).to(device, dtype)
    hidden_TD = model(tokens_T, documents)
    gradients = torch.autograd.grad((hidden_TD * direction_TD).sum(), list(model.parameters()))
    return [hidden_TD.detach(), *gradients]


_TINY = ModelConfig(
    vocab_size=512, d_model=128, n_layers=6, n_heads=4, d_head=64, d_ff=256, layers="SSG", window=37,
    kv_sharing=TailSharing(kind="tail", n_layers=3), max_length=256,
)  # fmt: skip


@torch.no_grad()
def generation_error(dtype: torch.dtype) -> float:
    """Log-probabilities of generated tokens: prefill, decoding and sampling, with windows and a shared tail."""
    model = Transformer(_TINY, seed=1).to("cuda", dtype)
    exact = Transformer(_TINY, seed=1).to("cuda", dtype).float()
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(512, (length,), generator=generator).tolist() for length in (1, 40, 150, 66)]
    found: list[float] = []
    expected: list[Tensor] = []
    completions = Generator(model, 4, 200, path="fused").generate(prompts, Sampling(20, (), temperature=1.0))
    for prompt, (one,) in zip(prompts, completions, strict=True):
        text = torch.tensor([*prompt, *one.tokens], device="cuda")
        logits_TV = exact.logits(exact(text, Documents.from_lengths([len(text)], device="cuda")))
        reply_T1 = text[len(prompt) :, None]
        expected.append(logits_TV[len(prompt) - 1 : -1].log_softmax(-1).gather(1, reply_T1)[:, 0])
        found += one.logprobs
    return distance([torch.tensor(found, device="cuda")], [torch.cat(expected)])


def _random(device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]
