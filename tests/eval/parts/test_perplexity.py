"""Tests of eval/parts/perplexity.py."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch import as_tensor, no_grad
from torch.nn import functional as F

from data.format.dialogue import Dialogue, Message, continuation_labels
from data.format.encode import encode_dialogue
from data.format.tokenizer import DialogueTokenizer
from data.packed.batch import collate
from data.packed.shards import PackedDataset
from eval.parts.engagement import labeled_turns
from eval.parts.ngram import PairCounts, Unigram, counted_pairs, ngram_losses
from eval.parts.perplexity import (
    CHARACTER,
    CONTROL,
    PARTNER,
    ScoredTargets,
    colon_table,
    message_structure,
    paired_difference,
    score_dataset,
    summarize,
    turn_label,
)
from eval.statistics import Bootstrap, Estimate
from model.attention_ops import Documents
from model.transformer import Transformer

BOOTSTRAP = Bootstrap(n_resamples=50)
Pack = Callable[[list[Dialogue]], Path]


def test_structure_of_a_document_with_colons_in_its_text(tokenizer: DialogueTokenizer) -> None:
    messages = (Message("Sam", "why: no"), Message("Alex", "yes : rain"))
    encoded = encode_dialogue(tokenizer, Dialogue("d", messages, "Alex"))
    number_L, control_L = message_structure(encoded.tokens, tokenizer.message_id, colon_table(tokenizer))
    assert tokenizer.decode(encoded.tokens[control_L].tolist()) == "Sam:Alex:"
    assert tokenizer.decode(encoded.tokens[(number_L == 1) & ~control_L].tolist()) == " why: no"
    assert tokenizer.decode(encoded.tokens[(number_L == 2) & ~control_L].tolist()) == " yes : rain"
    assert number_L[0] == 0 and not control_L[0]


def test_scored_loss_and_roles(
    dialogues: list[Dialogue], tokenizer: DialogueTokenizer, models: dict[str, Transformer], dataset_of: Pack
) -> None:
    dataset = PackedDataset(dataset_of(dialogues[:6]))
    model = models["sft"]
    rows = np.arange(dataset.n_rows)
    targets = score_dataset(model, dataset, tokenizer, rows, batch_tokens=200)
    batch = collate(dataset, rows)
    assert targets.nats_N.size == int(batch.has_target_T.sum())
    assert int((targets.role_N == CHARACTER).sum()) == int(batch.loss_mask_T.sum())
    # Every message of 6 dialogues has one <|message|>, a name and a colon that the prompt supplies.
    n_messages = sum(len(d.messages) for d in dialogues[:6])
    assert int((targets.role_N == CONTROL).sum()) >= 2 * n_messages
    ends = sum(m.speaker == "Sam" for d in dialogues[:6] for m in d.messages)
    assert int((targets.role_N == PARTNER).sum()) >= 2 * ends
    assert len(targets.bytes_D) == 6
    # The k-th target of a document has k tokens before it, <bos> among them.
    for document in range(6):
        assert targets.context_N[targets.document_N == document].tolist() == list(
            range(1, 1 + int((targets.document_N == document).sum()))
        )
    # The sum of the losses is the plain cross-entropy of each dialogue alone.
    total = 0.0
    for dialogue in dialogues[:6]:
        tokens_T = as_tensor(encode_dialogue(tokenizer, dialogue).tokens)
        with no_grad():
            logits_TV = model.logits(model(tokens_T, Documents.from_lengths([len(tokens_T)])))
        total += float(F.cross_entropy(logits_TV[:-1], tokens_T[1:], reduction="sum"))
    assert targets.nats_N.sum() == pytest.approx(total, rel=1e-4)
    figures = summarize(targets, BOOTSTRAP)
    text = sum(len(f"{m.speaker}: {m.text}".encode()) for d in dialogues[:6] for m in d.messages)
    assert figures["bits_per_byte"].value == pytest.approx(total / math.log(2) / text, rel=1e-4)


def test_a_long_dialogue_is_one_unit_and_its_messages_keep_their_numbers(
    dialogues: list[Dialogue], tokenizer: DialogueTokenizer, models: dict[str, Transformer], dataset_of: Pack
) -> None:
    """It is several documents, which repeat context: each token is scored once, under its message's number."""
    said = tuple(message for dialogue in dialogues[:9] for message in dialogue.messages)
    dataset = PackedDataset(dataset_of([dialogues[9], Dialogue("long", said, "Alex")]))
    assert len(dataset.documents()) > 3 and dataset.documents()["n_repeated"].max() > 10
    targets = score_dataset(models["sft"], dataset, tokenizer, np.arange(dataset.n_rows), batch_tokens=400)
    encoded = encode_dialogue(tokenizer, Dialogue("long", said, "Alex"))
    sizes = np.diff(np.append(encoded.message_starts, len(encoded.tokens)))
    # the first token after <bos> of a document has no other context, and is scored all the same
    turns, counts = np.unique(targets.turn_N[targets.dialogue_N == 1], return_counts=True)
    assert turns.tolist() == list(range(1, len(said) + 1)) and counts.tolist() == sizes.tolist()
    figures = summarize(targets, BOOTSTRAP)
    assert figures["loss"].n_clusters == figures["bits_per_byte"].n_clusters == 2
    batch = collate(dataset, np.arange(dataset.n_rows))
    labeled = labeled_turns(batch, tokenizer.message_id)
    labels = continuation_labels(Dialogue("long", said, "Alex"))
    expected = [number + 1 for number, label in enumerate(labels) if label >= 0]
    assert sorted(labeled.turn_N[labeled.dialogue_N == 1].tolist()) == expected


def test_count_models_see_the_same_targets(dialogues: list[Dialogue], dataset_of: Pack) -> None:
    dataset = PackedDataset(dataset_of(dialogues[:8]))
    rows = np.arange(dataset.n_rows)
    pairs = PairCounts.from_pairs(dataset.vocab_size, counted_pairs(dataset))
    batch = collate(dataset, rows)
    assert pairs.counts_P.sum() == int(batch.has_target_T.sum())
    targets = batch.targets_T[batch.has_target_T].numpy()
    losses = ngram_losses(dataset, dataset, 2)
    part = collate(dataset, rows[:2])
    expected = -np.log(Unigram(pairs).probability_V[part.targets_T[part.has_target_T].numpy()]).mean()
    assert losses["unigram"] == pytest.approx(expected)
    assert losses["bigram_kneser_ney"] < losses["unigram"]
    assert ngram_losses(dataset, dataset) == pytest.approx(ngram_losses(dataset, dataset, rows))
    assert 0 not in targets


def targets_with(nats: list[float], role: list[int], turn: list[int], document: list[int]) -> ScoredTargets:
    n = max(document) + 1
    arrays = (np.array(nats), np.array(role), np.array(turn), np.array(document))
    return ScoredTargets(*arrays, np.ones(len(nats), np.int64), np.full(n, 10), np.full(n, 5), np.arange(n))


def test_summary_of_known_losses() -> None:
    targets = targets_with([1.0, 2, 3, 4, 5, 6], [2, 0, 0, 2, 1, 1], [1, 1, 1, 20, 20, 20], [0, 0, 0, 1, 1, 1])
    figures = summarize(targets, BOOTSTRAP)
    assert figures["loss"].value == pytest.approx(3.5) and figures["perplexity"] == pytest.approx(math.exp(3.5))
    assert {role: e.value for role, e in figures["by_role"].items()} == {
        "character": 2.5,
        "partner": 5.5,
        "control": 2.5,
    }
    assert figures["by_turn"][0]["character"].value == 2.5 and figures["by_turn"][0]["partner"].value is None
    assert figures["by_turn"][-1]["turns"] == "17+" and figures["by_turn"][-1]["partner"].value == 5.5
    assert figures["bits_per_byte"].value == pytest.approx(21 / 20 / math.log(2))


def width(estimate: Estimate) -> float:
    assert estimate.low is not None and estimate.high is not None
    return estimate.high - estimate.low


def test_paired_difference_has_a_narrow_interval() -> None:
    """Much narrower than that of either loss, though the two vary ten times as much as their difference."""
    rng = np.random.default_rng(0)
    document = np.repeat(np.arange(20), 10).tolist()
    base = rng.gamma(2, 2, 200)
    gain = 0.5 + rng.normal(0, 0.1, 200)
    first, second = (targets_with(list(base + g), [0] * 200, [1] * 200, document) for g in (gain, 0 * gain))
    difference = paired_difference(first, second, first.role_N == CHARACTER, BOOTSTRAP)
    assert difference.value == pytest.approx(gain.mean())
    assert width(difference) < 0.2 * width(summarize(first, BOOTSTRAP)["loss"])


def test_tokens_of_a_dialogue_are_not_independent() -> None:
    """Losses that are equal within a dialogue and differ between dialogues have the interval of one token each."""
    of_dialogue = np.random.default_rng(1).gamma(2, 2, 20)
    many = targets_with(
        np.repeat(of_dialogue, 30).tolist(), [0] * 600, [1] * 600, np.repeat(np.arange(20), 30).tolist()
    )
    one = targets_with(of_dialogue.tolist(), [0] * 20, [1] * 20, list(range(20)))
    loss, alone = (summarize(targets, BOOTSTRAP)["loss"] for targets in (many, one))
    assert (loss.low, loss.high) == pytest.approx((alone.low, alone.high))
    zero = targets_with([0.0] * 600, [0] * 600, [1] * 600, many.document_N.tolist())
    gain = paired_difference(many, zero, many.role_N == CHARACTER, BOOTSTRAP)
    assert (gain.low, gain.high) == pytest.approx((alone.low, alone.high))


def test_turn_labels() -> None:
    assert [turn_label(*b) for b in ((1, 1), (3, 4), (17, 10**9))] == ["1", "3-4", "17+"]
