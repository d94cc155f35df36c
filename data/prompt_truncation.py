"""Cache-aware truncation: which parts of a prompt survive a token limit, in steps that keep the prefix stable."""

from collections.abc import Sequence
from itertools import groupby


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
        for i in block:
            if to_remove <= 0:
                break
            removed.add(i)
            to_remove -= lengths[i]
    return [i for i in range(len(lengths)) if i not in removed]
