"""Preference pairs from what users did at a turn: rules, exclusions, and caps that do not depend on the order.

Both replies of a pair were shown for exactly the same context. Every comparison that a rule finds is counted, as a pair
or by the reason of its exclusion.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from data.clean.ledger import Ledger
from data.clean.stable_hash import stable_hash
from data.feedback.conversation import Turn
from data.feedback.event import FeedbackEvent
from data.format.dialogue import Message
from data.sources.preferences import REPEATED, PreferencePair, reason_against_context, reason_against_pair
from recipes.loader import Section


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a comparison. `name` is the candidate's number, or "edit"; two replies of a turn have equal `context`
    if and only if their contexts are the same."""

    name: str
    text: str
    model: str | None  # None: the user's edit
    context: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """A comparison that a rule found at a turn; `excluded` is the reason why it is not a pair."""

    rule: str
    turn: Turn
    chosen: Side
    rejected: Side
    excluded: str | None = None

    @property
    def id(self) -> str:
        """Unique among the comparisons of a user."""
        event = self.turn.event
        return f"{event.conversation}/{event.turn}/{self.rule}/{self.chosen.name}>{self.rejected.name}"

    @property
    def texts(self) -> tuple[str, str]:
        return self.chosen.text, self.rejected.text


class KeptOverRegenerated(Section):
    """The kept reply over each of the others shown at the turn."""

    kind: Literal["kept_over_regenerated"]
    # The user must have written again within this time (who left may not have liked the reply); null: no limit.
    wrote_again_within_seconds: float | None = Field(gt=0)
    # A reply swiped away sooner was not read.
    min_seen_seconds: float = Field(default=0.0, ge=0)

    def comparisons(self, turn: Turn) -> Iterator[Comparison]:
        event = turn.event
        for number in range(len(event.candidates)):
            if number != event.kept:
                excluded = self._reason_against(event, number)
                yield Comparison(self.kind, turn, shown(turn, event.kept), shown(turn, number), excluded)

    def _reason_against(self, event: FeedbackEvent, rejected: int) -> str | None:
        within, seen = self.wrote_again_within_seconds, event.seen_seconds(rejected)
        last_shown = event.candidates[-1].time
        if within is not None and (event.wrote_again is None or event.wrote_again - last_shown > within):
            return "the user did not write on in time"
        return "swiped away unread" if seen is not None and seen < self.min_seen_seconds else None


class EditOverOriginal(Section):
    """The kept reply as edited by the user over the model's."""

    kind: Literal["edit_over_original"]

    def comparisons(self, turn: Turn) -> Iterator[Comparison]:
        if turn.event.edit:
            original = shown(turn, turn.event.kept)
            edited = Side("edit", turn.event.edit.text, None, original.context)
            yield Comparison(self.kind, turn, edited, original)


class MoreStars(Section):
    """Of two replies of a turn with stars, the one with more over the one with fewer."""

    kind: Literal["more_stars"]
    min_difference: int = Field(ge=1, le=4)

    def comparisons(self, turn: Turn) -> Iterator[Comparison]:
        stars = {number: given.stars for number, given in enumerate(turn.event.candidates) if given.stars is not None}
        for better, more in stars.items():
            for worse, fewer in stars.items():
                if more > fewer:
                    excluded = f"fewer than {self.min_difference} stars between them"
                    is_clear = more - fewer >= self.min_difference
                    sides = shown(turn, better), shown(turn, worse)
                    yield Comparison(self.kind, turn, *sides, None if is_clear else excluded)


PairRule = Annotated[KeptOverRegenerated | EditOverOriginal | MoreStars, Field(discriminator="kind")]


class PairSettings(Section):
    """The rules, and which of their pairs are kept. Lengths are in characters."""

    # If two rules find the same pair, it belongs to the first.
    rules: tuple[PairRule, ...] = Field(min_length=1)
    # Only replies of the same model are compared (edits are exempt), so that pairs do not identify models.
    same_model: bool = False
    # The ratio of the longer reply to the shorter: prevents learning length instead of quality.
    max_length_ratio: float | None = Field(default=None, ge=1)
    max_length_difference: int | None = Field(default=None, ge=0)
    # If there are more, those with the smallest hash: neither the first, nor those of the most active users.
    max_per_turn: int | None = Field(default=None, ge=1)
    max_per_user: int | None = Field(default=None, ge=1)

    @field_validator("rules")
    @classmethod
    def _distinct(cls, rules: tuple[PairRule, ...]) -> tuple[PairRule, ...]:
        for number, rule in enumerate(rules):
            if rule.kind in [earlier.kind for earlier in rules[:number]]:
                raise ValueError(f"{rule.kind} twice; give each rule once")
        return rules


@dataclass(slots=True)
class LengthOnly:
    """How often the chosen reply is the longer one: the length baseline of the pairs."""

    longer: int = 0
    shorter: int = 0
    same: int = 0

    def add(self, texts: tuple[str, str]) -> None:
        """Count a (chosen, rejected) pair of texts."""
        chosen, rejected = map(len, texts)
        self.longer += chosen > rejected
        self.shorter += chosen < rejected
        self.same += chosen == rejected

    def to_dict(self) -> dict[str, Any]:
        """The counts, and the accuracy of choosing the longer reply (a tie counts half); None without pairs."""
        n = self.longer + self.shorter + self.same
        share = round((self.longer + self.same / 2) / n, 4) if n else None
        return {"longer": self.longer, "shorter": self.shorter, "same": self.same, "longer_is_chosen": share}


@dataclass(slots=True)
class RuleCounts:
    """Counts of a rule's comparisons, and the lengths of its pairs before and after the length filters."""

    ledger: Ledger = field(default_factory=Ledger)
    before_length_filters: LengthOnly = field(default_factory=LengthOnly)
    written: LengthOnly = field(default_factory=LengthOnly)


PairCounts = dict[str, RuleCounts]


def shown(turn: Turn, number: int) -> Side:
    """A candidate as a side."""
    candidate = turn.event.candidates[number]
    return Side(str(number), candidate.text, candidate.model, turn.edits_seen(candidate.time))


def select_pairs(
    turns: Iterable[Turn],
    settings: PairSettings,
    user: str,
    seed: int,
    counts: PairCounts,
    max_context_messages: int | None = None,
) -> list[Comparison]:
    """The pairs of one user's turns, with contexts of at most this many messages; counts all comparisons in
    `counts`."""
    selected: list[Comparison] = []
    for turn in turns:
        found = [comparison for rule in settings.rules for comparison in rule.comparisons(turn)]
        for comparison in found:
            counts.setdefault(comparison.rule, RuleCounts()).ledger.read += 1
        sound = _sound(found, settings.same_model, max_context_messages, counts)
        good = [c for c in _without_contradictions(sound, counts) if _has_similar_lengths(c, settings, counts)]
        selected += _capped(good, settings.max_per_turn, "over max_per_turn", (seed, user), counts)
    selected = _capped(selected, settings.max_per_user, "over max_per_user", (seed, user), counts)
    for comparison in selected:
        counts[comparison.rule].ledger.kept += 1
        counts[comparison.rule].written.add(comparison.texts)
    return selected


def reason_against(comparison: Comparison, same_model: bool, max_context_messages: int | None) -> str | None:
    """Why these two replies are not a pair, apart from lengths; None if they are."""
    chosen, rejected = comparison.chosen, comparison.rejected
    if chosen.context != rejected.context:
        return "an earlier reply was edited between the two: not one context"
    if comparison.excluded:
        return comparison.excluded
    context = _context(comparison, max_context_messages)
    reason = reason_against_context(context, comparison.turn.event.character)
    if reason := reason or reason_against_pair(chosen.text, rejected.text):
        return reason
    if same_model and None not in (chosen.model, rejected.model) and chosen.model != rejected.model:
        return "different models"
    return None


def to_pair(comparison: Comparison, participant: str, max_context_messages: int | None) -> PreferencePair:
    """The record for train.dpo; `participant` is the user's pseudonym."""
    event, chosen, rejected = comparison.turn.event, comparison.chosen, comparison.rejected
    assert chosen.context == rejected.context, "a pair of different contexts"
    return PreferencePair(
        id=f"{participant}/{comparison.id}",
        messages=_context(comparison, max_context_messages),
        character=event.character,
        chosen=chosen.text,
        rejected=rejected.text,
        source="feedback",
        metadata={
            "rule": comparison.rule,
            "user": participant,
            "chosen_model": chosen.model,
            "rejected_model": rejected.model,
        },
    )


def _context(comparison: Comparison, max_messages: int | None) -> tuple[Message, ...]:
    """The context that both sides answered."""
    shown_at = comparison.turn.event.candidates[int(comparison.rejected.name)].time
    return comparison.turn.context(shown_at, max_messages)


def _sound(
    found: Sequence[Comparison], same_model: bool, max_context_messages: int | None, counts: PairCounts
) -> list[Comparison]:
    kept: dict[tuple[str, str], Comparison] = {}
    for comparison in found:
        reason = reason_against(comparison, same_model, max_context_messages)
        if reason is None and comparison.texts in kept:
            reason = REPEATED
        if reason is None:
            kept[comparison.texts] = comparison
        else:
            counts[comparison.rule].ledger.filtered[reason] += 1
    return list(kept.values())


def _without_contradictions(pairs: Sequence[Comparison], counts: PairCounts) -> Iterator[Comparison]:
    texts = {pair.texts for pair in pairs}
    for pair in pairs:
        if pair.texts[::-1] in texts:
            counts[pair.rule].ledger.filtered["the same turn has the opposite pair"] += 1
        else:
            yield pair


def _has_similar_lengths(pair: Comparison, settings: PairSettings, counts: PairCounts) -> bool:
    counts[pair.rule].before_length_filters.add(pair.texts)
    shorter, longer = sorted(map(len, pair.texts))
    reason = None
    if settings.max_length_ratio is not None and longer > settings.max_length_ratio * shorter:
        reason = "over max_length_ratio"
    elif settings.max_length_difference is not None and longer - shorter > settings.max_length_difference:
        reason = "over max_length_difference"
    if reason:
        counts[pair.rule].ledger.filtered[reason] += 1
    return reason is None


def _capped(
    pairs: Sequence[Comparison], most: int | None, reason: str, salt: tuple[int, str], counts: PairCounts
) -> list[Comparison]:
    """At most `most` of the pairs, in order, chosen by a hash of their ids."""
    if most is None or len(pairs) <= most:
        return list(pairs)
    chosen = smallest_hashes(["/".join(map(str, ("pair", *salt, pair.id))) for pair in pairs], most)
    for number, pair in enumerate(pairs):
        if number not in chosen:
            counts[pair.rule].ledger.filtered[reason] += 1
    return [pair for number, pair in enumerate(pairs) if number in chosen]


def smallest_hashes(identities: Sequence[str], most: int) -> set[int]:
    """The numbers of the `most` identities with the smallest hashes, independent of their order."""
    ranked = sorted(range(len(identities)), key=lambda number: (stable_hash(identities[number]), identities[number]))
    return set(ranked[:most])
