"""Each stage's loss on a handmade batch against a plain loop, and on a separable toy task that it must solve."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from data.format.dialogue import Message
from data.packed.batch import PackedBatch
from data.sources.preferences import PreferencePair, write_pairs
from model.attention import KeyValue
from model.attention_ops import Documents
from model.config import ModelConfig
from model.scalar_head import ScalarHead
from model.transformer import Block, Transformer
from model.weights import save_model
from recipes.loader import load_recipe
from recipes.run_inputs import InputError, output_sizes
from train.deepspeed.world import World
from train.dpo import DPORecipe, heldout_wins, preference_loss, prepare
from train.engagement import heldout_auc, roc_auc, scorer_loss, scores
from train.initial_model import content_key
from train.loop import no_grad_sum
from train.losses import continuation_loss
from train.preference.on_policy import score_replies
from train.preference.pair_rows import EncodedPair, PairRows, add_reference, reply_logprobs
from train.pretrain import language_model_loss
from train.sft import answer_loss
from train.stage import LossModule

CONFIG = ModelConfig(
    vocab_size=23, d_model=16, n_layers=2, n_heads=2, d_head=8, d_ff=16, layers="SG", window=4, max_length=64
)
ALONE, QUIET = World(0, 1, torch.device("cpu")), Console(quiet=True)
LENGTHS, ROW_LENGTH = [5, 3, 4, 4], 8
PAIRS = [EncodedPair([4, 5, 6], [7, 8, 2], [9, 2]), EncodedPair([10, 11], [12, 2], [13, 14, 15, 2])]


def batch_of(tokens: list[int], lengths: list[int], answers: list[int], labels: dict[int, int]) -> PackedBatch:
    """Documents one after the other; `answers` are positions whose next token the character wrote."""
    tokens_T = torch.tensor(tokens)
    has_target_T = torch.ones(len(tokens), dtype=torch.bool)
    has_target_T[torch.tensor(lengths).cumsum(0) - 1] = False
    loss_mask_T = torch.zeros(len(tokens), dtype=torch.bool)
    loss_mask_T[answers] = True
    label_T = torch.full((len(tokens),), -1, dtype=torch.int8)
    for place, label in labels.items():
        label_T[place] = label
    targets_T = torch.where(has_target_T, tokens_T.roll(-1), 0)
    document_lengths = torch.tensor(lengths, dtype=torch.int32)
    return PackedBatch(
        tokens_T,
        targets_T,
        has_target_T,
        loss_mask_T & has_target_T,
        label_T,
        document_lengths,
        np.zeros(0),
        ROW_LENGTH,
    )


def handmade() -> PackedBatch:
    tokens = torch.randint(4, 23, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3)).tolist()
    return batch_of(tokens, LENGTHS, answers=[2, 3, 9, 10, 13], labels={4: 1, 11: 0, 15: 1})


def random_head() -> ScalarHead:
    head = ScalarHead(CONFIG.d_model)
    torch.nn.init.normal_(head.score.weight, generator=torch.Generator().manual_seed(4))
    return head


def hidden_by_document(model: Transformer, tokens_T: Tensor) -> Tensor:
    """Hidden states of documents that the model reads one at a time."""
    return torch.cat([model(part, Documents.from_lengths([len(part)])) for part in tokens_T.split(LENGTHS)])


def loss_and_hidden_gradient(module: LossModule, batch: Any) -> tuple[float, Tensor]:
    kept: list[Tensor] = []

    def keep(trunk: Any, arguments: Any, hidden_TD: Tensor) -> None:
        hidden_TD.retain_grad()
        kept.append(hidden_TD)

    hook = module.trunk.register_forward_hook(keep)
    loss = module(batch).total
    loss.backward()
    hook.remove()
    assert len(kept) == 1 and kept[0].grad is not None
    return float(loss), kept[0].grad


@pytest.mark.parametrize("stage", ["pretrain", "sft", "engagement"])
def test_a_stages_loss_is_that_of_a_plain_loop_and_its_gradient_zero_elsewhere(stage: str) -> None:
    batch, model, head = handmade(), Transformer(CONFIG, seed=1), random_head()
    with torch.no_grad():
        hidden_TD = hidden_by_document(model, batch.tokens_T)
        logprobs_TV, score_T = model.logits(hidden_TD).log_softmax(-1), head(hidden_TD)
    if stage == "engagement":
        counted = {4: 1, 11: 0, 15: 1}
        expected = sum(math.log1p(math.exp(-float(score_T[t]) * (1 if label else -1))) for t, label in counted.items())
        module = LossModule(model, scorer_loss, head)
    else:
        places = {"pretrain": [0, 1, 2, 3, 5, 6, 8, 9, 10, 12, 13, 14], "sft": [2, 3, 9, 10, 13]}[stage]
        counted = dict.fromkeys(places, 1)
        expected = -sum(float(logprobs_TV[t, int(batch.tokens_T[t + 1])]) for t in counted)
        module = LossModule(model, language_model_loss if stage == "pretrain" else answer_loss)
    loss, gradient_TD = loss_and_hidden_gradient(module, batch)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradient_TD.any(1).nonzero()[:, 0].tolist() == list(counted)


def test_the_z_loss_is_part_of_training_only() -> None:
    module = LossModule(Transformer(CONFIG, seed=1), lambda m, batch: language_model_loss(m, batch, z_loss=0.5))
    with_z = float(module.train()(handmade()).total)
    without = float(module.eval()(handmade()).total)
    batch = handmade()
    logits_TV = module.trunk.logits(hidden_by_document(module.trunk, batch.tokens_T))
    expected = 0.5 * logits_TV.logsumexp(-1)[batch.has_target_T].square().sum()
    assert with_z - without == pytest.approx(float(expected), rel=1e-4)


def test_heldout_auc_is_over_the_labeled_turns_of_all_batches() -> None:
    model, head = Transformer(CONFIG, seed=1), random_head()
    module = LossModule(model, scorer_loss, head)
    tokens = torch.randint(4, 23, (2, sum(LENGTHS)), generator=torch.Generator().manual_seed(5)).tolist()
    labels = [{4: 1, 11: 0, 15: 1}, {2: 0, 7: 1, 13: 0}]
    batches = [batch_of(one, LENGTHS, [], label) for one, label in zip(tokens, labels, strict=True)]
    engine: Any = SimpleNamespace(module=module, world=ALONE)
    found: list[tuple[float, int]] = []
    for batch, label in zip(batches, labels, strict=True):
        with torch.no_grad():
            score_T = head(hidden_by_document(model, batch.tokens_T))
        found += [(float(score_T[place]), one) for place, one in label.items()]
    wins = [float(high > low) for high, one in found for low, other in found if one > other]
    assert heldout_auc(engine, batches) == pytest.approx(sum(wins) / len(wins))
    assert module.training


def test_an_evaluation_is_in_evaluation_mode() -> None:
    """Every part of the module, and all of them train afterwards."""
    modes: list[bool] = []

    def loss(module: LossModule, batch: PackedBatch) -> Any:
        modes.extend(part.training for part in module.modules())
        return language_model_loss(module, batch)

    module = LossModule(Transformer(CONFIG, seed=1), loss)
    engine: Any = SimpleNamespace(module=module, world=ALONE)
    figures = no_grad_sum(engine, [handmade()], lambda batch: int(batch.has_target_T.sum()))
    assert figures["heldout_loss"] > 0
    assert not any(modes) and len(modes) == len(list(module.modules()))
    assert all(part.training for part in module.modules())


def plain_reply_logprobs(model: Transformer, pairs: list[EncodedPair]) -> Tensor:
    """[chosen, rejected] x pair: each reply's log-probability, every sequence alone and token by token."""
    values_2B = torch.zeros(2, len(pairs))
    for column, pair in enumerate(pairs):
        for row, reply in enumerate((pair.chosen, pair.rejected)):
            whole = torch.tensor([*pair.prompt, *reply])
            with torch.no_grad():
                logprobs_TV = model.logits(model(whole, Documents.from_lengths([len(whole)]))).log_softmax(-1)
            for place in range(len(pair.prompt), len(whole)):
                values_2B[row, column] += logprobs_TV[place - 1, whole[place]]
    return values_2B


def test_dpo_is_equation_7_over_a_plain_loop_with_the_kept_reference(tmp_path: Path) -> None:
    policy, reference, rows = Transformer(CONFIG, seed=1), Transformer(CONFIG, seed=2), PairRows(PAIRS)
    add_reference(rows, reference, "key", tmp_path, 1, ALONE, QUIET)
    ours, theirs = plain_reply_logprobs(policy, PAIRS), plain_reply_logprobs(reference, PAIRS)
    margins = [0.5 * float((ours[0, i] - theirs[0, i]) - (ours[1, i] - theirs[1, i])) for i in range(2)]
    module = LossModule(policy, lambda m, batch: preference_loss(m, batch, beta=0.5, label_smoothing=0.0))
    batch = rows.collate(np.arange(2))
    sums = module(batch).sums
    loss, gradient_TD = loss_and_hidden_gradient(module, batch)
    assert loss == pytest.approx(sum(math.log1p(math.exp(-margin)) for margin in margins), rel=1e-4)
    assert float(sums["margin"]) == pytest.approx(sum(margins), rel=1e-4)
    assert float(sums["accuracy"]) == sum(margin > 0 for margin in margins)
    assert float(sums["chosen_drift"]) == pytest.approx(float((ours[0] - theirs[0]).sum()), rel=1e-4)
    assert float(sums["rejected_drift"]) == pytest.approx(float((ours[1] - theirs[1]).sum()), rel=1e-4)
    assert gradient_TD.any(1).nonzero()[:, 0].tolist() == [2, 3, 4, 6, 7, 10, 11, 13, 14, 15, 16]


@pytest.mark.parametrize("better", [True, False])
def test_accuracy_counts_pairs_whose_chosen_reply_gained(better: bool) -> None:
    policy = Transformer(CONFIG, seed=1)
    batch = PairRows(PAIRS).collate(np.arange(2))
    shift_B = torch.tensor([-1.0, -1.0, 1.0, 1.0]) * (1 if better else -1)
    batch = dataclasses.replace(batch, reference_B=reply_logprobs(policy, batch).detach() + shift_B)
    sums = preference_loss(LossModule(policy, lambda m, b: m(b)), batch, 0.1, 0.0).sums
    assert float(sums["accuracy"]) == (2 if better else 0)


def test_the_reference_is_kept_by_weights_and_by_both_sides(tmp_path: Path) -> None:
    other_rejected = [dataclasses.replace(pair, rejected=[16, 2]) for pair in PAIRS]
    other_chosen = [dataclasses.replace(pair, chosen=[17, 2]) for pair in PAIRS]
    for seed in (1, 2):
        model = Transformer(CONFIG, seed=seed)
        for pairs in (PAIRS, other_rejected, other_chosen):
            rows = PairRows(pairs)
            add_reference(rows, model, f"weights {seed}", tmp_path, 2, ALONE, QUIET)
            with torch.no_grad():
                direct_B = reply_logprobs(model, rows.collate(np.arange(2)))
            assert rows.reference_RB.any()
            torch.testing.assert_close(torch.from_numpy(rows.reference_RB), direct_B.reshape(2, -1))
            torch.testing.assert_close(direct_B.reshape(2, -1), plain_reply_logprobs(model, pairs))
    assert len(list(tmp_path.iterdir())) == 6


@pytest.fixture
def prepared(tmp_path: Path, data_dir: Path) -> Callable[[int], Any]:
    """What train.dpo prepares from a model with this seed's weights, always in the same run directory."""
    config = CONFIG.model_copy(update={"vocab_size": 320, "max_length": 128})
    pairs = [
        PreferencePair(
            f"{user} {n}", (Message("Ann", f"tea {user} {n}"),), "Ben", "yes", "no", "t", {"user": f"u{user}"}
        )
        for user in range(8)
        for n in range(3)
    ]
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    (tmp_path / "dpo.yaml").write_text(
        f"stage: dpo\nrun_dir: {tmp_path / 'dpo'}\ninit_from: {tmp_path / 'start'}\ndata: {data_dir}\n"
        f"pairs: [{{kind: file, path: {tmp_path / 'pairs.jsonl'}}}]\nmax_pair_tokens: 128\nheldout_fraction: 0.4\n"
        "loop: {max_steps: 6, rows_per_step: 4, rows_per_micro_batch: 2, evaluate_every: 3, save_every: 3, keep: 1}\n"
        "optimizer: {kind: adamw, lr: 1e-3}\nschedule: {kind: cosine}\nengine: {precision: float32}\n"
    )

    def prepare_from(seed: int) -> Any:
        state = Transformer(config, seed=seed).state_dict()
        files = {path.name: path for path in data_dir.glob("tokenizer*")}
        save_model(tmp_path / "start" / "model", config, state, files=files)
        done = {"content": f"content {seed}", "outputs": output_sizes(tmp_path / "start", ["model"])}
        (tmp_path / "start" / "done.json").write_text(json.dumps(done))
        return prepare(load_recipe(DPORecipe, tmp_path / "dpo.yaml"), ALONE, QUIET)

    return prepare_from


def test_dpo_starts_at_margin_zero_with_each_start_models_own_reference(prepared: Callable[[int], Any]) -> None:
    for seed in (1, 2):
        job = prepared(seed)
        loss = job.module(job.stage.collate(np.arange(4)))
        assert float(loss.total.detach()) == pytest.approx(4 * math.log(2), rel=1e-5)
        assert abs(float(loss.sums["margin"])) < 1e-5


def test_heldout_wins_are_those_of_their_pairs(prepared: Callable[[int], Any]) -> None:
    job = prepared(1)
    rows = job.stage.rows
    parts = np.array_split(np.random.default_rng(0).permutation(rows.n_rows), 3)
    batches = []
    for part in parts:
        batch = rows.collate(part)
        chosen, rejected = reply_logprobs(job.module.trunk, batch).detach().chunk(2)
        change = torch.tensor([[-1.0, 0.0, 2.0][row % 3] for row in part])  # how much more the policy prefers chosen
        batches.append((part, dataclasses.replace(batch, reference_B=torch.cat([chosen - change, rejected]))))
    engine: Any = SimpleNamespace(module=job.module, world=ALONE)
    wins = heldout_wins(engine, batches, rows.n_rows)
    assert wins.tolist() == [[0.0, 0.5, 1.0][row % 3] for row in range(rows.n_rows)]


def heldout_margins(job: Any, fused: bool) -> list[float]:
    """Margin of each held-out pair, from the batches that the evaluation at step 0 reads."""
    for block in job.module.trunk.blocks:
        assert block.fused == fused
    found: list[Tensor] = []
    keep = job.module.register_forward_hook(lambda module, given, loss: found.append(loss.sums["margin"]))
    engine: Any = SimpleNamespace(module=job.module, world=ALONE)
    figures = job.stage.evaluate(engine)
    keep.remove()
    assert figures["heldout_accuracy"] == 0.5
    return [float(margin) for margin in found]


def test_heldout_margins_are_exactly_zero_at_step_0(prepared: Callable[[int], Any]) -> None:
    margins = heldout_margins(prepared(1), fused=False)
    assert len(margins) > 2
    assert set(margins) == {0.0}


@pytest.mark.skipif(not find_spec("triton"), reason="fused blocks need Triton")
def test_the_reference_runs_the_policys_fused_blocks(
    prepared: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins for the fused blocks: Triton's interpreter takes minutes."""

    def other_rounding(block: Block, x_TD: Tensor, *given: Any) -> tuple[Tensor, KeyValue]:
        out_TD, key_value = block._plain(x_TD, *given)
        return out_TD * 1.001, key_value

    prepared(1)  # leaves a reference that plain blocks computed
    monkeypatch.setattr("model.execution.why_not_fused", lambda device: None)
    monkeypatch.setattr("model.kernels.fused_block.fused_block", other_rounding)
    job = prepared(1)
    assert set(heldout_margins(job, fused=True)) == {0.0}
    for block in job.module.trunk.blocks:
        block.fused = False
    batch = job.stage.collate(np.arange(4))
    assert not torch.equal(reply_logprobs(job.module.trunk, batch), batch.reference_B), "plain blocks give other values"


def test_a_start_model_is_known_by_its_run_and_its_weights_are_not_hashed(
    prepared: Callable[[int], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hashed(path: Path) -> str:
        assert "start/model" not in path.as_posix()
        return "sha256"

    monkeypatch.setattr("recipes.run_inputs.file_sha256", hashed)
    prepared(1)
    prepared(2)
    assert len(list((tmp_path / "dpo" / "reference").iterdir())) == 4
    weights = tmp_path / "start" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    with pytest.raises(InputError, match=r"model\.safetensors has [\d,]+ bytes, [\d,]+ bytes were written"):
        content_key({"init_from": str(tmp_path / "start")})


def test_no_user_has_pairs_on_both_sides(prepared: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sides: list[set[str]] = []
    monkeypatch.setattr(
        "train.dpo.add_reference", lambda rows, *rest: sides.append({pair.group for pair in rows.pairs})
    )
    prepared(1)
    training, heldout = sides
    assert len(training) + len(heldout) == 8
    assert not training & heldout


def test_scores_of_replies_are_those_of_the_scorer_at_each_last_token() -> None:
    model, head = Transformer(CONFIG, seed=1), random_head()
    prompts, replies = [[4, 5, 6], [10, 11]], [[7, 8, 2], [12, 2]]
    found = score_replies(model, head, prompts, replies)
    for score, prompt, reply in zip(found, prompts, replies, strict=True):
        whole = torch.tensor([*prompt, *reply])
        with torch.no_grad():
            assert score == pytest.approx(float(head(model(whole, Documents.from_lengths([len(whole)])))[-1]), abs=1e-5)


def train(module: LossModule, batches: Callable[[int], Any], steps: int) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        module(batches(step)).total.backward()
        optimizer.step()


def test_fine_tuning_learns_a_reply_that_the_prompt_decides() -> None:
    """Documents [x, noise, x + 8, 2] of which the third token is trained; the noise cannot be learned."""

    def batch(seed: int) -> PackedBatch:
        generator = torch.Generator().manual_seed(seed)
        documents = []
        for _ in range(16):
            x, noise = torch.randint(4, 10, (2,), generator=generator).tolist()
            documents += [x, noise, x + 8, 2]
        return batch_of(documents, [4] * 16, answers=list(range(1, 64, 4)), labels={})

    module = LossModule(Transformer(CONFIG, seed=1), answer_loss)
    train(module, batch, 150)
    with torch.no_grad():
        assert float(module(batch(10_000)).total) / 16 < 0.2


def test_the_scorer_learns_which_replies_are_answered() -> None:
    def batch(seed: int) -> PackedBatch:
        x = torch.randint(4, 20, (32,), generator=torch.Generator().manual_seed(seed)).tolist()
        documents = [token for one in x for token in (3, one, 5, 2)]
        return batch_of(documents, [4] * 32, [], {4 * i + 3: int(one >= 12) for i, one in enumerate(x)})

    module = LossModule(Transformer(CONFIG, seed=1), scorer_loss, ScalarHead(CONFIG.d_model))
    train(module, batch, 100)
    unseen = batch(10_000)
    labeled_T = unseen.label_T >= 0
    with torch.no_grad():
        score_T = scores(module, unseen)
    assert roc_auc(score_T[labeled_T].numpy(), unseen.label_T[labeled_T].numpy()) > 0.9
    assert float(continuation_loss(score_T, unseen.label_T)) / 32 < math.log(2)


def test_preferences_raise_the_margin_of_unseen_pairs(tmp_path: Path) -> None:
    pairs = [EncodedPair([4 + i % 7, 4 + i // 7], [12, 2], [13, 2]) for i in range(28)]
    policy = Transformer(CONFIG, seed=1)
    rows, heldout = PairRows(pairs[::2]), PairRows(pairs[1::2])
    for part in (rows, heldout):
        add_reference(part, policy, "key", tmp_path, 1, ALONE, QUIET)
    module = LossModule(policy, lambda m, batch: preference_loss(m, batch, beta=0.1, label_smoothing=0.0))
    train(module, lambda step: rows.collate(np.arange(14)), 40)
    with torch.no_grad():
        sums = module(heldout.collate(np.arange(14))).sums
    assert float(sums["accuracy"]) == 14
    assert float(sums["margin"]) / 14 > 0.1
