"""Preference pairs as rows for training: token ids, micro-batches, and log-probabilities under the reference."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from safetensors.numpy import load_file, save
from torch import Tensor

from data.format.encode import encode_reply
from data.format.message_encoder import MessageEncoder
from data.format.tokenizer import DialogueTokenizer
from data.prompt.fit import fit_prompt
from data.sources.preferences import PreferencePair, reason_against_context
from data.sources.record import LeftOut
from model.attention_ops import Documents
from model.transformer import Transformer
from recipes.files import atomic_file
from train.deepspeed.world import World
from train.losses import sequence_logprobs
from train.stage import share_of_rank
from train.token_logprobs import token_logprobs

CONTEXT_CUT = "what the reply answers does not fit"


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of a pair. The prompt ends where the character's text begins; each reply ends with `<|end|>`."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    group: str = ""
    """Pairs with the same group stay on one side of the train/held-out split."""


@dataclass(frozen=True)
class PairBatch:
    """Chosen and rejected sequences of B pairs, packed: the B chosen ones first, then the B rejected.

    loss_mask_T marks positions whose target belongs to a reply; sequence_T numbers the sequence of each token.
    """

    tokens_T: Tensor
    targets_T: Tensor
    loss_mask_T: Tensor
    sequence_T: Tensor
    sequence_lengths: list[int]
    reference_B: Tensor
    """Reference log-probabilities of the 2B replies, in the same order."""


@dataclass
class PairRows:
    """Preference pairs as numbered rows for the loop, and their reference log-probabilities."""

    pairs: Sequence[EncodedPair]
    reference_RB: np.ndarray = field(default_factory=lambda: np.zeros((2, 0), np.float32))
    """Row 0: chosen, row 1: rejected; one column per pair."""

    @property
    def n_rows(self) -> int:
        return len(self.pairs)

    @property
    def row_length(self) -> int:
        """Tokens of the longest pair, both sides together."""
        return max(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in self.pairs)

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for pair in self.pairs:
            for part in (pair.prompt, pair.chosen, pair.rejected):
                digest.update(np.array([len(part), *part], np.int64).tobytes())
        return digest.hexdigest()

    def collate(self, rows: np.ndarray) -> PairBatch:
        """Pack these pairs. Targets are the next tokens; the loss mask covers reply tokens."""
        chosen = [(self.pairs[row].prompt, self.pairs[row].chosen) for row in rows]
        rejected = [(self.pairs[row].prompt, self.pairs[row].rejected) for row in rows]
        tokens, targets, answer, sequence, lengths = [], [], [], [], []
        for number, (prompt, reply) in enumerate([*chosen, *rejected]):
            whole = [*prompt, *reply]
            tokens += whole[:-1]
            targets += whole[1:]
            answer += [False] * (len(prompt) - 1) + [True] * len(reply)
            sequence += [number] * (len(whole) - 1)
            lengths.append(len(whole) - 1)
        reference_B = torch.from_numpy(self.reference_RB[:, rows].reshape(-1)) if self.reference_RB.size else None
        return PairBatch(
            torch.tensor(tokens), torch.tensor(targets), torch.tensor(answer), torch.tensor(sequence), lengths,
            torch.zeros(2 * len(rows)) if reference_B is None else reference_B,
        )  # fmt: skip


def encode_pairs(
    pairs: Sequence[PreferencePair], tokenizer: DialogueTokenizer, max_tokens: int
) -> tuple[list[EncodedPair], Counter[str]]:
    """Token ids of the pairs that fit `max_tokens` (data/prompt/fit.py), and counts of the others by reason."""
    encoded: list[EncodedPair] = []
    left_out: Counter[str] = Counter()
    encoder = MessageEncoder(tokenizer)
    for pair in pairs:
        chosen, rejected = encode_reply(tokenizer, pair.chosen), encode_reply(tokenizer, pair.rejected)
        longest = max(len(chosen), len(rejected))
        prompt = fit_prompt(encoder, pair.messages, pair.character, max_tokens, longest)
        if isinstance(prompt, LeftOut):
            left_out[prompt.reason] += 1
        elif reason_against_context(prompt.messages, pair.character):
            left_out[CONTEXT_CUT] += 1
        else:
            encoded.append(EncodedPair(prompt.tokens, chosen, rejected, pair.group))
    return encoded, left_out


def reply_logprobs(trunk: Transformer, batch: PairBatch) -> Tensor:
    """Log-probabilities of the 2B replies of a batch, float32, from one forward pass."""
    device = trunk.embed_tokens.weight.device
    places_T = batch.loss_mask_T.nonzero()[:, 0].to(device)
    hidden_TD = trunk(batch.tokens_T.to(device), Documents.from_lengths(batch.sequence_lengths, device=device))
    targets_T = batch.targets_T.to(device)[places_T]
    embed_VD, softcap = trunk.embed_tokens.weight, trunk.config.final_logit_softcap
    logprobs_T, _ = token_logprobs(hidden_TD[places_T], embed_VD, targets_T, softcap)
    return sequence_logprobs(logprobs_T, batch.sequence_T.to(device)[places_T], len(batch.sequence_lengths))


@torch.no_grad()
def add_reference(
    rows: PairRows, trunk: Transformer, model_key: str, folder: Path, rows_per_micro_batch: int, world: World,
    console: Console,
) -> None:  # fmt: skip
    """Set `rows.reference_RB` from `trunk`, cached in `folder` by the content of the pairs and by `model_key`.

    The micro-batches are those of the evaluation at step 0, so that its margins are exactly 0.
    """
    key = hashlib.sha256(f"{rows.fingerprint}:{model_key}".encode()).hexdigest()[:24]
    path = folder / f"reference_{key}.safetensors"
    if not path.exists():
        trunk.eval()
        parts = share_of_rank(np.arange(rows.n_rows), rows_per_micro_batch, world)
        values_RB = np.zeros((2, rows.n_rows), np.float32)
        for part in track(parts, "reference log-probabilities", console=console, disable=not console.is_terminal):
            values_RB[:, part] = reply_logprobs(trunk, rows.collate(part)).float().cpu().numpy().reshape(2, -1)
        trunk.train()
        if world.size > 1:
            total = torch.from_numpy(values_RB).to(world.device)
            torch.distributed.all_reduce(total)
            values_RB = total.cpu().numpy()
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(path, "wb") as file:
                file.write(save({"reference_RB": values_RB}))
        world.barrier()
    rows.reference_RB = load_file(path)["reference_RB"]
