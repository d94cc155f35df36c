"""Held-out loss on packed rows: overall, by speaker and by turn, with intervals over dialogues."""

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import PositiveInt

from data.format.tokenizer import DialogueTokenizer
from data.packed.batch import PackedBatch
from data.packed.shards import PackedDataset
from eval.scoring import OnProgress, hidden_states, silent, target_logprobs
from eval.statistics import NOT_NEGATIVE, Bootstrap, Estimate
from model.transformer import Transformer
from recipes.loader import Section

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

# The role of a target. `control`: <|message|> and the speaker's name, which the prompt supplies.
ROLES = ("character", "partner", "control")
CHARACTER, PARTNER, CONTROL = range(3)
TURN_BINS = ((1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 10**9))


class PerplexitySection(Section):
    """Number of held-out rows to score, evenly spread."""

    heldout_rows: PositiveInt


@dataclass(frozen=True)
class ScoredTargets:
    """N scored targets: loss, role, turn (1 is the first message of the dialogue), document (a long dialogue has
    several), and the number of tokens before the target in its document."""

    nats_N: FloatArray
    role_N: IntArray
    turn_N: IntArray
    document_N: IntArray
    context_N: IntArray
    bytes_D: IntArray  # UTF-8 bytes of the text of each document's targets
    characters_D: IntArray
    dialogue_D: IntArray

    @property
    def dialogue_N(self) -> IntArray:
        """The dialogue of each target, the cluster of intervals."""
        return np.asarray(self.dialogue_D[self.document_N])


def message_structure(
    tokens_L: IntArray, message_id: int, has_colon_V: NDArray[np.bool_]
) -> tuple[IntArray, NDArray[np.bool_]]:
    """For each token of a document: the number of its message (0 before the first), and whether it is control.

    Control tokens are those from <|message|> to the token with the first colon, since a speaker's name has no colon.
    """
    number_L = np.cumsum(tokens_L == message_id)
    control_L = np.zeros(tokens_L.size, dtype=bool)
    in_header = False
    for i, token in enumerate(tokens_L.tolist()):
        in_header = in_header or token == message_id
        control_L[i] = in_header
        if in_header and has_colon_V[token]:
            in_header = False
    return number_L, control_L


def colon_table(tokenizer: DialogueTokenizer) -> NDArray[np.bool_]:
    """True for the ids whose text contains a colon."""
    return np.array([":" in tokenizer.decode([i]) for i in range(tokenizer.vocab_size)])


def targets_of_batch(
    batch: PackedBatch, nats_T: FloatArray, tokenizer: DialogueTokenizer, has_colon_V: NDArray[np.bool_]
) -> list[ScoredTargets]:
    """The targets of each document of a batch; `nats_T` is the loss at every position."""
    tokens_T, has_target_T, loss_mask_T = (x.numpy() for x in (batch.tokens_T, batch.has_target_T, batch.loss_mask_T))
    ends = np.cumsum(batch.documents["length"], dtype=np.int64)
    starts = ends - batch.documents["length"]
    out = []
    for start, end, document in zip(starts.tolist(), ends.tolist(), batch.documents, strict=True):
        at_T = np.flatnonzero(has_target_T[start:end]) + start
        if at_T.size == 0:
            continue
        number_L, control_L = message_structure(tokens_T[start:end], tokenizer.message_id, has_colon_V)
        target_L = at_T + 1 - start  # has_target_T: the next token is in the same document
        role_N = np.where(control_L[target_L], CONTROL, np.where(loss_mask_T[at_T], CHARACTER, PARTNER))
        text = tokenizer.decode(tokens_T[at_T + 1].tolist())
        size, length = np.array([len(text.encode())]), np.array([len(text)])
        document_N, dialogue = np.zeros(at_T.size, np.int64), np.array([document["dialogue"]], np.int64)
        # the first token that is not repeated belongs to message `first_message`, counted from 0
        before_own = number_L[max(1, document["n_repeated"])] - document["first_message"] - 1
        turn_N = number_L[target_L] - before_own
        out.append(ScoredTargets(nats_T[at_T], role_N, turn_N, document_N, target_L, size, length, dialogue))
    return out


@torch.inference_mode()
def score_dataset(
    model: Transformer,
    dataset: PackedDataset,
    tokenizer: DialogueTokenizer,
    rows: IntArray,
    batch_tokens: int,
    on_progress: OnProgress = silent,
) -> ScoredTargets:
    """Score the targets of these rows."""
    has_colon_V = colon_table(tokenizer)
    parts: list[ScoredTargets] = []
    for batch, hidden_TD in hidden_states(model, dataset, rows, batch_tokens, on_progress):
        counted_T = batch.has_target_T.to(hidden_TD.device)
        targets_T = batch.targets_T.to(hidden_TD.device)[counted_T]
        nats_T = np.zeros(len(batch.tokens_T))
        nats_T[batch.has_target_T.numpy()] = -target_logprobs(model, hidden_TD[counted_T], targets_T)
        parts += targets_of_batch(batch, nats_T, tokenizer, has_colon_V)
    assert parts, "the held-out rows have no target"
    arrays = {field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(parts[0])}
    arrays["document_N"] = np.repeat(np.arange(len(parts)), [part.nats_N.size for part in parts])
    return ScoredTargets(**arrays)


def summarize(targets: ScoredTargets, bootstrap: Bootstrap) -> dict[str, Any]:
    """Loss in nats a token overall, by role and by turn (text of both speakers), bits a byte and a character."""

    def loss(chosen_N: NDArray[np.bool_] | slice) -> Estimate:
        nats_N = targets.nats_N[chosen_N]
        return bootstrap.mean(nats_N, targets.dialogue_N[chosen_N], NOT_NEGATIVE)

    def bits_per(units_D: IntArray) -> Estimate:
        return bootstrap.ratio(bits_D, units_D.astype(np.float64), targets.dialogue_D, NOT_NEGATIVE)

    bits_D = np.bincount(targets.document_N, weights=targets.nats_N, minlength=targets.bytes_D.size) / math.log(2)
    text_N = targets.role_N != CONTROL
    overall = loss(slice(None))
    assert overall.value is not None
    return {
        "loss": overall,
        "perplexity": math.exp(overall.value),
        "bits_per_byte": bits_per(targets.bytes_D),
        "bits_per_character": bits_per(targets.characters_D),
        "by_role": {role: loss(targets.role_N == number) for number, role in enumerate(ROLES)},
        "by_turn": [
            {
                "turns": turn_label(low, high),
                "first": low,
                "character": loss(text_N & in_turns(targets, low, high) & (targets.role_N == CHARACTER)),
                "partner": loss(text_N & in_turns(targets, low, high) & (targets.role_N == PARTNER)),
            }
            for low, high in TURN_BINS
        ],
    }


def paired_difference(
    first: ScoredTargets, second: ScoredTargets, chosen_N: NDArray[np.bool_], bootstrap: Bootstrap
) -> Estimate:
    """Loss of `first` minus loss of `second` on the same targets, in nats a token."""
    assert np.array_equal(first.document_N, second.document_N) and np.array_equal(first.role_N, second.role_N)
    difference_N = first.nats_N[chosen_N] - second.nats_N[chosen_N]
    return bootstrap.ratio(difference_N, np.ones_like(difference_N), first.dialogue_N[chosen_N])


def turn_label(low: int, high: int) -> str:
    """`3-4`, `5`, `17+`."""
    if low == high:
        return str(low)
    return f"{low}+" if high >= 10**9 else f"{low}-{high}"


def in_turns(targets: ScoredTargets, low: int, high: int) -> NDArray[np.bool_]:
    """Which targets are in messages number `low` to `high`."""
    return np.asarray((targets.turn_N >= low) & (targets.turn_N <= high))
