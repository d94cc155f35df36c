"""Cache-aware truncation to a token limit. The cut moves rarely; in between, every prompt extends the previous one, so
that the prefix cache stays valid.

**The cost of a move.** Let the prompt have a limit of L tokens, of which h are never cut (such as a definition) and
R = L - h are left for the conversation, which grows by m tokens a turn. A cut at the limit that leaves R - s tokens
lasts s / m turns. In this period the cache misses the new tokens, m a turn and s in total, and once the R - s tokens
that the move kept: R in total, *however deep the cut is*. The prompts of these turns have (s / m) (L - s / 2) tokens,
so the share of prompt tokens in the cache is

    reuse = 1 - m R / (s (L - s / 2)),

which grows with s. (If the reply's generated tokens are cached, only the user's part of m is new.) The price is
context: s / 2 on average. Equal cuts are optimal for a given average cost: for a number of moves and a given sum of
s^2 / 2, the sum of s is largest if all s are equal.

**The plan.** `planned_parts` takes the average cost c, a share of the context, and cuts s = 2 c R: the room is filled
to 1 - c on average and never below 1 - 2 c (up to the size of a message). With h = 0, reuse = 1 - m / (2 c (1 - c) L);
at c = 1/4, the default, this is 1 - 8 m / (3 L): 95% for a limit of 53 turns, 90% for 27 and 97.5% for 107. No rule
that removes the oldest messages first has a higher long-run reuse at this cost.

Prompt Poet's rule (`surviving_parts`) has a constant s too, its `truncation_step`: with long pinned parts, a step of
half the limit can remove the whole conversation. Both rules are functions of the conversation so far, without state.
"""

from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import groupby

CONTEXT_COST = 0.25
"""The share of the context that `planned_parts` gives up on average."""

_GRAIN = 64  # space is reserved in multiples of this part of the limit for what follows the last part that may be cut


def surviving_parts(lengths: Sequence[int], priorities: Sequence[int], token_limit: int, step: int) -> list[int]:
    """Numbers of the parts that remain. Parts of priority 0 always do; the caller checks the limit.

    Prompt Poet's algorithm: the tokens to remove are the surplus rounded up to a multiple of `step`; runs of parts with
    equal priority are removed, highest priority first, as a whole if they fit into what is to be removed, else from
    their front. It is stateless, and the cut moves only when the surplus crosses a multiple of `step`.
    """
    surplus = sum(lengths) - token_limit
    to_remove = -(-max(surplus, 0) // step) * step
    blocks = [list(block) for _, block in groupby(range(len(lengths)), key=lambda i: priorities[i])]
    removed: set[int] = set()
    for block in sorted((b for b in blocks if priorities[b[0]] > 0), key=lambda block: -priorities[block[0]]):
        if to_remove <= 0:
            break
        whole = sum(lengths[i] for i in block) <= to_remove  # then empty parts at its end are removed too
        for i in block:
            if to_remove <= 0 and not whole:
                break
            removed.add(i)
            to_remove -= lengths[i]
    return [i for i in range(len(lengths)) if i not in removed]


def planned_parts(
    lengths: Sequence[int], priorities: Sequence[int], token_limit: int, context_cost: float = CONTEXT_COST
) -> list[int]:
    """Numbers of the parts that remain if cuts cost `context_cost` (0 to 0.5) of the context on average.

    Parts of priority 0 or less always remain; the caller checks the limit. Others are cut highest priority first,
    oldest first, as in Prompt Poet. The cut is where it would be if parts had arrived in order after the pinned ones,
    with a cut whenever the limit was exceeded; it may come early by up to a 64th of the limit. A cost of 0 is naive
    truncation: keep as much as fits, with a new cut every turn.
    """
    room = _room(lengths, priorities, token_limit)
    least = (1 - 2 * context_cost) * room
    queue: list[tuple[int, int, int]] = []  # parts that may be cut and remain, in the order of removal
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
    """The tokens left for parts that may be cut. What follows them (in a group chat another reply every turn) is
    rounded up, so that its length does not move the cut."""
    pinned = [i for i, priority in enumerate(priorities) if priority <= 0]
    last = max((i for i, priority in enumerate(priorities) if priority > 0), default=-1)
    tail = sum(lengths[i] for i in pinned if i > last)
    grain = max(1, token_limit // _GRAIN)
    return token_limit - sum(lengths[i] for i in pinned if i < last) - -(-tail // grain) * grain
