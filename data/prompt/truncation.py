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

**The plan.** `planned_parts` is given the share c of the context that it may cost on average: s = 2 c R, from a full
room down to 1 - 2 c of it, so that the room is 1 - c full on average and never below 1 - 2 c (up to the size of a
message). With h = 0 that is reuse = 1 - m / (2 c (1 - c) L): at c = 1/4, the default, 1 - 8 m / (3 L), which is 95%
for a limit of 53 turns' tokens, 90% for 27 and 97.5% for 107. In the long run no rule that removes the oldest first
has more at this cost: below 53 turns, 95% and a quarter exclude each other.

Prompt Poet's rule (`surviving_parts`) has an even s, too, its `truncation_step`, of whatever is to be cut: where the
pinned parts are long, a step of half the limit can leave nothing of the conversation. Both rules are functions of the
conversation so far: no server has to remember anything.
"""

from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import groupby

CONTEXT_COST = 0.25
"""Share of the context that `planned_parts` gives up, on average, for the cache."""

_GRAIN = 64  # the plan has this part of the limit, or a multiple, for what follows the last part that may be cut


def surviving_parts(lengths: Sequence[int], priorities: Sequence[int], token_limit: int, step: int) -> list[int]:
    """Numbers of the parts that remain. Parts of priority 0 always do; the caller checks whether the rest fits.

    Prompt Poet's algorithm: the tokens to remove are the surplus rounded up to a multiple of `step`; blocks of
    neighbors with one priority go, highest priority first, each whole if it fits what is still to remove, else from
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
    """Numbers of the parts that remain when cuts are planned to cost `context_cost` (0 to 0.5) of the context.

    Parts of priority 0 or less always remain; the caller checks whether the rest fits. Others go highest priority
    first, oldest first, as in Prompt Poet. They are taken to have arrived in their order, after those that are never
    cut, and the cut is where cutting at each arrival would have brought it. It may come up to a 64th of the limit
    early. A cost of 0 is naive truncation: as much is kept as fits, and the cut moves every turn.
    """
    room = _room(lengths, priorities, token_limit)
    least = (1 - 2 * context_cost) * room
    queue: list[tuple[int, int, int]] = []  # what may be cut and is still there, in the order in which it goes
    tokens = 0
    removed: set[int] = set()
    for i, (length, priority) in enumerate(zip(lengths, priorities, strict=True)):
        if priority <= 0:
            continue
        heappush(queue, (-priority, i, length))
        tokens += length
        if tokens <= room:
            continue
        while queue and (tokens > room or (tokens - queue[0][2] >= least and len(queue) > 1)):
            _, number, gone = heappop(queue)
            tokens -= gone
            removed.add(number)
    return [i for i in range(len(lengths)) if i not in removed]


def _room(lengths: Sequence[int], priorities: Sequence[int], token_limit: int) -> int:
    """The tokens that are left for parts that may be cut. What is never cut and follows them is another reply every
    turn in a group chat: it is rounded up, so that its length moves no cut."""
    pinned = [i for i, priority in enumerate(priorities) if priority <= 0]
    last = max((i for i, priority in enumerate(priorities) if priority > 0), default=-1)
    tail = sum(lengths[i] for i in pinned if i > last)
    grain = max(1, token_limit // _GRAIN)
    return token_limit - sum(lengths[i] for i in pinned if i < last) - -(-tail // grain) * grain
