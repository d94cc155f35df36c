"""The prefix cache: a radix tree of token blocks, one KV cache page each, with one root for each cache salt."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from model.inference.blocks import PageAllocator


@dataclass(eq=False, repr=False, slots=True)
class _Block:
    """A node of the radix tree: the tokens of one full page. A root has no page and belongs to a salt."""

    tokens: tuple[int, ...]
    page: int
    parent: _Block | None
    children: dict[tuple[int, ...], _Block] = field(default_factory=dict)
    salt: str | None = None  # of a root


@dataclass
class CacheCounters:
    """Totals since start."""

    hit_tokens: int = 0
    missed_tokens: int = 0
    evicted_pages: int = 0


class PrefixCache:
    """Pages of finished and prefilled sequences; the cache holds one reference to each page in `allocator`.

    Only full pages are shared, so a shared page is never written again. Not thread-safe: the engine's loop owns it.
    """

    def __init__(self, allocator: PageAllocator, page_size: int):
        self.allocator = allocator
        self.page_size = page_size
        self.counters = CacheCounters()
        self._roots: dict[str | None, _Block] = {}
        # least recently used first; a block comes before its parent, so the first is a leaf
        self._by_age: OrderedDict[_Block, None] = OrderedDict()

    @property
    def n_pages(self) -> int:
        """Pages the cache holds."""
        return len(self._by_age)

    def match(self, tokens: Sequence[int], salt: str | None = None) -> list[int]:
        """Pages of the longest cached prefix of `tokens`, with a reference each that the caller releases.

        The last token is never matched: a sequence needs one new token to have logits.
        """
        path = list(self._walk(tokens[:-1], salt))
        self._touch(path)
        pages = [block.page for block in path]
        self.allocator.retain(pages)
        return pages

    def count_lookup(self, n_hit: int, n_tokens: int) -> None:
        """Count one admitted sequence: `n_hit` of its `n_tokens` prompt tokens came from the cache."""
        self.counters.hit_tokens += n_hit
        self.counters.missed_tokens += n_tokens - n_hit

    def insert(self, tokens: Sequence[int], pages: Sequence[int], salt: str | None = None) -> int:
        """Add the full pages of a sequence; returns the number of pages that are new to the cache.

        The caller keeps its own references to `pages`. A block that is already cached keeps its page.
        """
        n_full = len(tokens) // self.page_size
        assert len(pages) >= n_full, "a sequence has a page for every full block"
        if not n_full:
            return 0
        path = list(self._walk(tokens, salt))
        parent = path[-1] if path else self._roots.setdefault(salt, _Block((), -1, None, salt=salt))
        n_new = n_full - len(path)
        for index in range(len(path), n_full):
            block_tokens = tuple(tokens[index * self.page_size : (index + 1) * self.page_size])
            block = parent.children[block_tokens] = _Block(block_tokens, pages[index], parent)
            self.allocator.retain([block.page])
            self._by_age[block] = None
            path.append(block)
            parent = block
        self._touch(path)
        return n_new

    def n_evictable(self, at_most: int) -> int:
        """How many pages `evict(at_most)` would free now."""
        return len(self._evictable(at_most))

    def evict(self, count: int) -> int:
        """Free up to `count` pages, least recently used leaves first, never a page in use by a sequence."""
        evicted = self._evictable(count)
        self._remove(evicted)
        self.counters.evicted_pages += len(evicted)
        return len(evicted)

    def _evictable(self, at_most: int) -> list[_Block]:
        """The least recently used blocks without a page in use, their own or a descendant's; children before parents.

        A page in use counts as used now: its path moves to the recent end, so that later calls do not look at it again.
        The amortized cost of a page is therefore constant, however many pages are cached.
        """
        found: list[_Block] = []
        read: list[_Block] = []
        above_read: set[_Block] = set()
        for block in self._by_age:
            if len(found) >= at_most:
                break
            is_read = self.allocator.refcount(block.page) > 1
            if is_read or block in above_read:
                if block not in above_read:
                    read.append(block)
                if block.parent is not None:
                    above_read.add(block.parent)
            else:
                found.append(block)
        for block in read:
            self._touch(_path_to(block))
        return found

    def forget(self, tokens: Sequence[int], salt: str | None = None) -> int:
        """Drop the blocks along `tokens` and all their descendants, even those in use; returns their number."""
        dropped = list(self._walk(tokens, salt))[:1]
        for block in dropped:  # the list grows by the children
            dropped += block.children.values()
        self._remove(dropped[::-1])
        return len(dropped)

    def _remove(self, blocks: Sequence[_Block]) -> None:
        for block in blocks:
            assert block.parent is not None
            del self._by_age[block]
            del block.parent.children[block.tokens]
            self.allocator.release([block.page])
            if block.parent.parent is None and not block.parent.children:
                del self._roots[block.parent.salt]

    def _walk(self, tokens: Sequence[int], salt: str | None) -> Iterator[_Block]:
        """Cached blocks along `tokens`, from the root down."""
        block = self._roots.get(salt)
        for start in range(0, len(tokens) - self.page_size + 1, self.page_size):
            block = block and block.children.get(tuple(tokens[start : start + self.page_size]))
            if block is None:
                return
            yield block

    def _touch(self, path: Sequence[_Block]) -> None:
        for block in reversed(path):
            self._by_age.move_to_end(block)


def _path_to(block: _Block) -> list[_Block]:
    """The blocks from the root's child to `block`."""
    path = [block]
    while (parent := path[-1].parent) is not None and parent.parent is not None:
        path.append(parent)
    return path[::-1]
