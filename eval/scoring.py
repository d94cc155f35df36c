"""Log-probabilities of replies and scores of conversations, batched by length to reduce padding."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.packed.batch import PackedBatch, collate
from data.packed.shards import PackedDataset
from model.attention_ops import Documents
from model.scalar_head import ScalarHead
from model.transformer import Transformer

FloatArray = NDArray[np.float64]
OnProgress = Callable[[int, int], None]  # items done, items in all


def share_of(on_progress: OnProgress, number: int, of: int) -> OnProgress:
    """The progress callback of step `number` of `of` equal steps."""
    return lambda done, total: on_progress(number * total + done, of * total)


def spread_rows(n_rows: int, wanted: int) -> NDArray[np.int64]:
    """`wanted` evenly spaced row numbers of a dataset, or all of them.

    Packing puts long documents first, so the first rows are not a representative sample.
    """
    return np.unique(np.linspace(0, n_rows - 1, min(wanted, n_rows)).round().astype(np.int64))


LOGIT_ROWS = 4096  # positions whose logits are held at once: 4096 x 8192 float32 is 128 MiB


def silent(done: int, total: int) -> None:
    """A progress callback that does nothing."""


def hidden_states(
    model: Transformer, dataset: PackedDataset, rows: NDArray[np.int64], batch_tokens: int, on_progress: OnProgress
) -> Iterator[tuple[PackedBatch, Tensor]]:
    """Batches of these rows, each with hidden_TD."""
    device = model.embed_tokens.weight.device
    step = max(1, batch_tokens // dataset.row_length)
    for start in range(0, len(rows), step):
        batch = collate(dataset, rows[start : start + step])
        documents = Documents.from_lengths(batch.document_lengths, batch.row_length, device)
        yield batch, model(batch.tokens_T.to(device), documents)
        on_progress(min(start + step, len(rows)), len(rows))


def target_logprobs(model: Transformer, hidden_TD: Tensor, targets_T: Tensor) -> FloatArray:
    """log p(target) at each position, in nats (temperature 1)."""
    parts = []
    for start in range(0, len(targets_T), LOGIT_ROWS):
        logits_TV = model.logits(hidden_TD[start : start + LOGIT_ROWS]).float()
        chosen_T = logits_TV.gather(1, targets_T[start : start + LOGIT_ROWS, None])[:, 0]
        parts.append((chosen_T - logits_TV.logsumexp(1)).cpu().numpy().astype(np.float64))
    return np.concatenate(parts) if parts else np.empty(0)


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Batches of indices with similar lengths, at most `batch_tokens` after padding (or a single sequence)."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _pack(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Documents, int]:
    """(tokens_T, documents, row length): one row a sequence, the padding is a separate document."""
    row = max(len(sequence) for sequence in sequences)
    tokens = [[*sequence, *[0] * (row - len(sequence))] for sequence in sequences]
    lengths = [part for s in sequences for part in (len(s), row - len(s)) if part]
    return torch.tensor(tokens, device=device).reshape(-1), Documents.from_lengths(lengths, row, device), row


@torch.inference_mode()
def reply_logprobs(
    model: Transformer,
    items: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_tokens: int,
    on_progress: OnProgress = silent,
) -> list[FloatArray]:
    """For each (prompt, reply) the log-probability of every reply token given the tokens before it."""
    assert all(prompt and reply for prompt, reply in items)
    device = model.embed_tokens.weight.device
    out: list[FloatArray] = [np.empty(0)] * len(items)
    done = 0
    for batch in batches_by_length([len(p) + len(r) for p, r in items], batch_tokens):
        tokens_T, documents, row = _pack([[*items[i][0], *items[i][1]] for i in batch], device)
        hidden_TD = model(tokens_T, documents)
        # position t - 1 predicts the token at t
        starts = [place * row + len(items[i][0]) for place, i in enumerate(batch)]
        target_T = torch.cat([torch.arange(s, s + len(items[i][1])) for s, i in zip(starts, batch)]).to(device)
        logprob_T = target_logprobs(model, hidden_TD[target_T - 1], tokens_T[target_T])
        lengths = [len(items[i][1]) for i in batch]
        for i, part in zip(batch, np.split(logprob_T, np.cumsum(lengths)[:-1]), strict=True):
            out[i] = part
        done += len(batch)
        on_progress(done, len(items))
    return out


@torch.inference_mode()
def next_token_logprobs(
    model: Transformer, prompts: Sequence[Sequence[int]], batch_tokens: int, on_progress: OnProgress = silent
) -> Tensor:
    """logprob_BV (float32): the distribution after each prompt."""
    out = torch.empty(len(prompts), model.config.vocab_size)
    done = 0
    for batch in batches_by_length([len(p) for p in prompts], batch_tokens):
        hidden_BD = _hidden_at_ends(model, [prompts[i] for i in batch])
        out[batch] = model.logits(hidden_BD).float().log_softmax(-1).cpu()
        done += len(batch)
        on_progress(done, len(prompts))
    return out


@torch.inference_mode()
def score_conversations(
    scorer: tuple[Transformer, ScalarHead],
    conversations: Sequence[Sequence[int]],
    batch_tokens: int,
    on_progress: OnProgress = silent,
) -> FloatArray:
    """The scorer's logit at the last token of each conversation (<|end|> of the reply)."""
    model, head = scorer
    out = np.zeros(len(conversations))
    done = 0
    for batch in batches_by_length([len(c) for c in conversations], batch_tokens):
        hidden_BD = _hidden_at_ends(model, [conversations[i] for i in batch])
        out[batch] = head(hidden_BD).float().cpu().numpy()
        done += len(batch)
        on_progress(done, len(conversations))
    return out


def _hidden_at_ends(model: Transformer, sequences: Sequence[Sequence[int]]) -> Tensor:
    device = model.embed_tokens.weight.device
    tokens_T, documents, row = _pack(sequences, device)
    ends_B = torch.tensor([place * row + len(s) - 1 for place, s in enumerate(sequences)], device=device)
    hidden_TD: Tensor = model(tokens_T, documents)
    return hidden_TD[ends_B]


def sigmoid(logits_N: FloatArray) -> FloatArray:
    """Sigmoid without overflow."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * logits_N)))
