"""Cache-aware truncation: which parts of a prompt survive a token limit. The cut moves rarely, and in between every
prompt is the one before it and more, so that a cache of the prefix stays valid.

**What a move costs.** Let the prompt have a limit of L tokens, of which h are never cut (a definition, say) and
R = L - h are the room for the conversation, which grows by m tokens a turn. A cut when the room is full that leaves
R - s lasts s / m turns. In such a period the cache lacks what is new, m a turn and s in all, and once what the move
kept, R - s: together R, *however deep the cut was*. The turns' prompts sum to (s / m) (L - s / 2), so the share of
prompt tokens that the cache holds is

    reuse = 1 - m R / (s (L - s / 2)),

which grows with s: cut deeper and more rarely. (With the tokens of the reply cached as it was generated, only the
user's part of m is new.) What it costs is context, s / 2 on average. Among the periodic plans of one average cost the
even one is best: for a number of moves, the sum of s is largest, given the sum of s^2 / 2, when all s are equal.

**The plan.** `planned_parts` spends at most the share c of the room that naive truncation (which keeps as much as
fits, and loses the prefix every turn) would use, averaged over the conversation so far, on every turn of it. While
the conversation still fits, nothing is given up, and c a turn is saved: a budget B, in tokens times turns. A cut by s
gives up s - m t after t turns, and stays within B and the c R that each turn adds when

    max over t of (s - c R) t - m t^2 / 2 = (s - c R)^2 / (2 m) <= B,   so   s = c R + sqrt(2 m B).

The first cut, with B = c R^2 / (2 m), is s = (c + sqrt(c)) R, and then s = 2 c R for ever: the even plan of average
cost c. At c = 1/4 that is three quarters, then halves, and with h = 0, reuse = 1 - 8 m / (3 L): 95% needs L >= 53 m.
m is taken as the mean so far, and B is what was really saved, so that a plan upset by long messages rights itself.

Prompt Poet's rule (`surviving_parts`) has an even s, its `truncation_step`, from the first cut on. Both are functions
of the conversation so far: no server has to remember anything.
"""

import math
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from itertools import groupby

CONTEXT_COST = 0.25
"""Share of the context that `planned_parts` may give up, on average, for the cache."""

_LEAST_KEPT = 0.25  # of the room, after any cut
_NEWEST_KEPT = 2  # parts that only the limit itself removes: a question, and what it answers
_GRAIN = 64  # the plan rounds what is never cut up to this part of the limit: a longer name at the end moves no cut


def surviving_parts(lengths: Sequence[int], priorities: Sequence[int], token_limit: int, step: int) -> list[int]:
    """Numbers of the parts that remain. Parts of priority 0 always do; the caller checks whether the rest fits.

    Prompt Poet's algorithm: the tokens to remove are the surplus rounded up to a multiple of `step`; blocks of
    neighbours with one priority go, highest priority first, each whole if it fits what is still to remove, else from
    its front. It has no state, and the cut moves only when the surplus crosses a multiple of `step`.
    """
    surplus = sum(lengths) - token_limit
    to_remove = -(-max(surplus, 0) // step) * step
    blocks = [list(block) for _, block in groupby(range(len(lengths)), key=lambda i: priorities[i])]
    removed: set[int] = set()
    for block in sorted((b for b in blocks if priorities[b[0]] > 0), key=lambda block: -priorities[block[0]]):
        if to_remove <= 0:
            break
        whole = sum(lengths[i] for i in block) <= to_remove  # then parts without tokens at its end go as well
        for i in block:
            if to_remove <= 0 and not whole:
                break
            removed.add(i)
            to_remove -= lengths[i]
    return [i for i in range(len(lengths)) if i not in removed]


def planned_parts(
    lengths: Sequence[int], priorities: Sequence[int], token_limit: int, context_cost: float = CONTEXT_COST
) -> list[int]:
    """Numbers of the parts that remain when each cut is planned to cost `context_cost` (0 to 1) of the context.

    Parts of priority 0 or less always remain; the caller checks whether the rest fits. Others go highest priority
    first, oldest first, as in Prompt Poet. The parts are taken to have arrived in their order, those that are never
    cut before all others; the cut is where cutting at every arrival would have brought it. Messages that keep getting
    shorter can bring the average cost above `context_cost` until the next cut.
    """
    removed: set[int] = set()
    for move in planned_cuts(lengths, priorities, token_limit, context_cost):
        removed.update(move)
    return [i for i in range(len(lengths)) if i not in removed]


def planned_cuts(
    lengths: Sequence[int], priorities: Sequence[int], token_limit: int, context_cost: float = CONTEXT_COST
) -> Iterator[list[int]]:
    """For each part that may be cut, in order: the parts that its arrival removes, [] where the cut stays."""
    room = _room(lengths, priorities, token_limit)
    kept, naive = _Kept(), _Kept()
    budget = 0.0  # tokens times turns that may still be given up
    arrived = turns = 0
    for i, (length, priority) in enumerate(zip(lengths, priorities, strict=True)):
        if priority <= 0:
            continue
        turns += 1
        arrived += length
        kept.add(i, length, priority)
        naive.add(i, length, priority)
        naive.shrink(room)
        move: list[int] = []
        if kept.tokens > room:
            step = context_cost * room + math.sqrt(2 * (arrived / turns) * max(budget, 0.0))
            move = kept.shrink(max(room - step, _LEAST_KEPT * room), spare=_NEWEST_KEPT)
            move += kept.shrink(room)
        budget += context_cost * naive.tokens - (naive.tokens - kept.tokens)
        yield move


def _room(lengths: Sequence[int], priorities: Sequence[int], token_limit: int) -> int:
    grain = max(1, token_limit // _GRAIN)
    pinned = sum(length for length, priority in zip(lengths, priorities, strict=True) if priority <= 0)
    return token_limit - -(-pinned // grain) * grain


class _Kept:
    """Parts that may be cut, in the order in which they go."""

    def __init__(self) -> None:
        self.tokens = 0
        self._queue: list[tuple[int, int, int]] = []

    def add(self, number: int, length: int, priority: int) -> None:
        heappush(self._queue, (-priority, number, length))
        self.tokens += length

    def shrink(self, most: float, spare: int = 0) -> list[int]:
        """Remove parts until at most `most` tokens, or only `spare` parts, are left; the numbers of the removed."""
        removed = []
        while self.tokens > most and len(self._queue) > spare:
            _, number, length = heappop(self._queue)
            self.tokens -= length
            removed.append(number)
        return removed
