"""Recall of a fact that is stated early in a real conversation and asked later.

The log-probability of the answer is compared between two contexts that differ only in the stated value, which shows
an effect of the statement even for a model too weak to answer. Every fact is asked at every distance, in the same
conversation.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from data.format.dialogue import NARRATOR, Dialogue, Message
from data.format.encode import encode_message, encode_prompt, message_body, speaker_prefix
from data.format.tokenizer import DialogueTokenizer
from data.format.visible_text import says_nothing
from eval.parts.recall_fact import FACT_KINDS, FactKind, Wording
from eval.scoring import OnProgress, next_token_logprobs, reply_logprobs, silent
from eval.statistics import Bootstrap
from model.transformer import Transformer
from recipes.loader import Section

FloatArray = NDArray[np.float64]
STATEMENTS = 2  # each conversation states the first candidate, or the second


class RecallSection(Section):
    """`n_items` facts with `n_candidates` values each, asked at each of `distances` (tokens from the stated value to
    the answer)."""

    n_items: PositiveInt
    n_candidates: Annotated[int, Field(ge=STATEMENTS)]
    distances: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


@dataclass(frozen=True)
class RecallProbe:
    """A fact asked at one distance. `prompts[s]` states candidate s (0 or 1) and ends before the value in the answer.

    `distance`: tokens from the stated value's first token to the answer's value: a local layer can attend to it if its
    window has at least that many keys. All candidates (token ids) have the same length.
    """

    kind: str
    dialogue_id: str
    wanted_distance: int
    distance: int
    prompts: tuple[tuple[int, ...], tuple[int, ...]]
    values: tuple[str, ...]
    candidates: tuple[tuple[int, ...], ...]
    dialogue: int  # index of the first dialogue whose messages are used


def usable_values(tokenizer: DialogueTokenizer, kind: FactKind, n_candidates: int) -> dict[str, tuple[int, ...]]:
    """Values with the same number of tokens, the smallest number with at least `n_candidates` values; else none.

    A value is usable if it has the same tokens in all statements and answers of the kind.
    """
    by_length: dict[int, dict[str, tuple[int, ...]]] = {}
    for value in kind.values:
        tokens = tuple(tokenizer.encode(f" {value}"))
        if all(_is_spliced(tokenizer, wording, value, tokens) for wording in kind.wordings):
            by_length.setdefault(len(tokens), {})[value] = tokens
    enough = [length for length, values in by_length.items() if len(values) >= n_candidates]
    return by_length[min(enough)] if enough else {}


def _is_spliced(tokenizer: DialogueTokenizer, wording: Wording, value: str, tokens: tuple[int, ...]) -> bool:
    before = tokenizer.encode(_before_value(wording))
    stated = tokenizer.encode(message_body(wording.statement.format(value=value)))
    answer = tokenizer.encode(message_body(wording.answer))
    said = tokenizer.encode(message_body(f"{wording.answer} {value}"))
    return stated[: len(before) + len(tokens)] == [*before, *tokens] and said == [*answer, *tokens]


def _before_value(wording: Wording) -> str:
    return message_body(wording.statement.partition(" {value}")[0])


def build_probes(
    dialogues: Sequence[Dialogue], tokenizer: DialogueTokenizer, section: RecallSection, seed: int
) -> list[RecallProbe]:
    """`section.n_items` facts at every distance. No dialogue is used for two facts.

    Between statement and question are real messages of two-speaker dialogues; if a dialogue is too short, messages of
    the next one follow under the same two names. Raises ValueError for too few usable values or dialogues.
    """
    values = {kind.name: usable_values(tokenizer, kind, section.n_candidates) for kind in FACT_KINDS}
    kinds = [kind for kind in FACT_KINDS if values[kind.name]]
    if not kinds:
        raise ValueError(
            f"recall.n_candidates: {section.n_candidates} values asked for, but no kind of fact has that many with the "
            "same number of tokens; lower it"
        )
    rng = np.random.default_rng(seed)
    pairs = [number for number, dialogue in enumerate(dialogues) if len(_speakers(dialogue)) == 2]
    order = [pairs[place] for place in rng.permutation(len(pairs))]
    ordered = [dialogues[number] for number in order]
    probes: list[RecallProbe] = []
    first = number = 0
    while len(probes) < section.n_items * len(section.distances):
        if first >= len(ordered):
            raise ValueError(
                f"recall.n_items: {section.n_items} facts asked for, the {len(pairs)} held-out dialogues of two "
                f"speakers give {len(probes) // len(section.distances)}; lower it, or the largest of recall.distances"
            )
        kind = kinds[number % len(kinds)]
        wording = kind.wordings[int(rng.integers(len(kind.wordings)))]
        filler = _Filler(tokenizer, ordered[first:], max(section.distances))
        found = _probes_of_fact(tokenizer, filler, order[first], kind, wording, values[kind.name], section, rng)
        probes += found
        first += filler.n_dialogues if found else 1
        number += 1
    return probes


def _speakers(dialogue: Dialogue) -> list[str]:
    return list(dict.fromkeys(m.speaker for m in dialogue.messages if m.speaker != NARRATOR))


class _Filler:
    """Real messages under the names of the first dialogue's speakers, at least `n_tokens` tokens if available."""

    def __init__(self, tokenizer: DialogueTokenizer, dialogues: Sequence[Dialogue], n_tokens: int):
        self.dialogue_id, self.speakers = dialogues[0].id, _speakers(dialogues[0])
        self.messages: list[Message] = []
        self.n_dialogues, lengths = 0, [0]
        for message, number in self._renamed(dialogues):
            self.n_dialogues = number
            self.messages.append(message)
            lengths.append(lengths[-1] + len(encode_message(tokenizer, message)))
            if lengths[-1] > n_tokens:
                break
        self.tokens_before = np.array(lengths)  # tokens of the first n messages, for n = 0, 1, ...

    def _renamed(self, dialogues: Sequence[Dialogue]) -> Iterator[tuple[Message, int]]:
        for number, dialogue in enumerate(dialogues, start=1):
            names = dict(zip(_speakers(dialogue), self.speakers, strict=True))
            for message in dialogue.messages:
                if message.speaker != NARRATOR and not says_nothing(message.text):
                    yield Message(names[message.speaker], message.text), number

    def words(self) -> set[str]:
        """All words of messages and names, in lower case."""
        texts = [message.text for message in self.messages]
        return set(re.findall(r"\w+", " ".join([*texts, *self.speakers]).lower()))


def _probes_of_fact(
    tokenizer: DialogueTokenizer,
    filler: _Filler,
    dialogue: int,
    kind: FactKind,
    wording: Wording,
    values: Mapping[str, tuple[int, ...]],
    section: RecallSection,
    rng: np.random.Generator,
) -> list[RecallProbe]:
    """The fact at every distance; empty if the messages do not come close to one of the distances."""
    said = filler.words()
    unsaid = [value for value in values if value.lower() not in said]
    if len(unsaid) < section.n_candidates:
        return []
    chosen = tuple(unsaid[i] for i in rng.permutation(len(unsaid))[: section.n_candidates])
    speaker, other = filler.speakers
    before = [tokenizer.bos_id, tokenizer.message_id, *tokenizer.encode(speaker_prefix(speaker))]
    value_at = len(before) + len(tokenizer.encode(_before_value(wording)))

    def prompt(value: str, n_messages: int) -> tuple[int, ...]:
        statement = Message(speaker, wording.statement.format(value=value))
        question = Message(speaker, wording.question)
        ids = encode_prompt(tokenizer, [statement, *filler.messages[:n_messages], question], other)
        return (*ids, *tokenizer.encode(message_body(wording.answer)))

    shortest = len(prompt(chosen[0], 0)) - value_at
    probes = []
    for wanted in section.distances:
        miss = np.abs(shortest + filler.tokens_before - wanted)
        n_messages = int(miss.argmin())
        if miss[n_messages] > max(8, wanted // 8):
            return []
        prompts = (prompt(chosen[0], n_messages), prompt(chosen[1], n_messages))
        candidates = tuple(values[value] for value in chosen)
        distance = len(prompts[0]) - value_at
        assert len(prompts[0]) == len(prompts[1]) and prompts[0][value_at : value_at + 1] == candidates[0][:1]
        probes.append(
            RecallProbe(kind.name, filler.dialogue_id, wanted, distance, prompts, chosen, candidates, dialogue)
        )
    return probes


def candidate_logprobs(
    model: Transformer, probes: Sequence[RecallProbe], batch_tokens: int, on_progress: OnProgress = silent
) -> FloatArray:
    """logprob_PSC: the log-probability of each candidate after each of a probe's two prompts."""
    n_candidates = len(probes[0].candidates)
    prompts = [prompt for probe in probes for prompt in probe.prompts]
    candidates = [probe.candidates for probe in probes for _ in range(STATEMENTS)]
    if all(len(tokens) == 1 for some in candidates for tokens in some):  # one pass a prompt is enough
        logprob_BV = next_token_logprobs(model, prompts, batch_tokens, on_progress).double().numpy()
        first_BC = np.array([[tokens[0] for tokens in some] for some in candidates])
        flat = np.take_along_axis(logprob_BV, first_BC, axis=1).reshape(-1)
    else:
        items = [(prompt, tokens) for prompt, some in zip(prompts, candidates, strict=True) for tokens in some]
        flat = np.array([values.sum() for values in reply_logprobs(model, items, batch_tokens, on_progress)])
    return flat.reshape(len(probes), STATEMENTS, n_candidates)


def gains(logprob_PSC: FloatArray) -> FloatArray:
    """Log-probability of a value after its statement minus that after the other's (nats); mean of the two values."""
    first_P = logprob_PSC[:, 0, 0] - logprob_PSC[:, 1, 0]
    second_P = logprob_PSC[:, 1, 1] - logprob_PSC[:, 0, 1]
    return (first_P + second_P) / 2


def first_ranks(logprob_PSC: FloatArray) -> FloatArray:
    """Share of the two prompts whose stated value is the most probable candidate, with ties in random order."""
    total_P = np.zeros(len(logprob_PSC))
    for stated in range(STATEMENTS):
        best_P = logprob_PSC[:, stated].max(axis=1)
        ties_P = (logprob_PSC[:, stated] == best_P[:, None]).sum(axis=1)
        total_P += (logprob_PSC[:, stated, stated] == best_P) / ties_P
    return total_P / STATEMENTS


def summarize_recall(
    probes: Sequence[RecallProbe], logprobs: Mapping[str, FloatArray], against: str, bootstrap: Bootstrap
) -> dict[str, Any]:
    """For every distance and model: gain, its difference to the model `against`, and rank-1 accuracy."""
    wanted_P = np.array([probe.wanted_distance for probe in probes])
    distance_P = np.array([probe.distance for probe in probes])
    bins = []
    for wanted in dict.fromkeys(wanted_P.tolist()):
        chosen_P = wanted_P == wanted
        dialogue_P = np.array([probe.dialogue for probe in probes], dtype=np.int64)[chosen_P]
        base_P = gains(logprobs[against])[chosen_P]
        models = {}
        for name, logprob_PSC in logprobs.items():
            gain_P = gains(logprob_PSC)[chosen_P]
            models[name] = {
                "gain": bootstrap.mean(gain_P, dialogue_P),
                "difference": None if name == against else bootstrap.mean(gain_P - base_P, dialogue_P),
                "accuracy": bootstrap.share(first_ranks(logprob_PSC)[chosen_P], dialogue_P),
            }
        here_P = distance_P[chosen_P]
        places = {"mean": float(here_P.mean()), "least": int(here_P.min()), "most": int(here_P.max())}
        bins.append({"wanted": wanted, "distance": places, "n": int(chosen_P.sum()), "models": models})
    n_candidates = len(probes[0].candidates)
    kinds = {kind: len({probe.dialogue_id for probe in probes if probe.kind == kind}) for kind in _kinds(probes)}
    return {"n_candidates": n_candidates, "chance": 1 / n_candidates, "kinds": kinds, "distances": bins}


def _kinds(probes: Sequence[RecallProbe]) -> list[str]:
    return sorted({probe.kind for probe in probes})
