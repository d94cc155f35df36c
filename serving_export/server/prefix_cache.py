"""The inter-turn prefix cache: a tree of token blocks, one cache page each, found by chained hash and proven by tokens.

The hash is only an index: a block counts as found when its tokens, its parent and its tenant's salt are the same.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from model.inference.kv_cache import PageAllocator

Digest = Callable[[bytes], bytes]


def sha256(content: bytes) -> bytes:
    """The default index key of a block."""
    return hashlib.sha256(content).digest()


@dataclass(eq=False)
class _Block:
    """One full page of tokens below its parent; roots have no page and stand for a tenant."""

    key: bytes
    tokens: tuple[int, ...]
    page: int
    parent: _Block | None
    n_children: int = 0
    salt: str | None = None  # of a root


@dataclass
class CacheCounters:
    """Totals since start, in tokens (blocks for `evicted_pages`)."""

    hit_tokens: int = 0
    missed_tokens: int = 0
    evicted_pages: int = 0


class PrefixCache:
    """Pages of finished (and prefilled) sequences, kept with one holder of its own in `allocator` for each.

    Only full pages are shared, so a shared page is never written again. Not thread-safe: the engine's loop owns it.
    """

    def __init__(self, allocator: PageAllocator, page_size: int, digest: Digest = sha256):
        self.allocator = allocator
        self.page_size = page_size
        self.counters = CacheCounters()
        self._digest = digest
        self._roots: dict[str | None, _Block] = {}
        self._blocks: dict[bytes, _Block] = {}
        # oldest first; a block always stands before its parent, so the oldest is a leaf
        self._by_age: OrderedDict[_Block, None] = OrderedDict()

    @property
    def n_pages(self) -> int:
        """Pages the cache holds."""
        return len(self._by_age)

    def match(self, tokens: Sequence[int], salt: str | None = None) -> list[int]:
        """Pages of the longest cached prefix of `tokens`, retained for the caller, who releases them.

        At least one token stays unmatched, since a sequence needs one new token to have logits.
        """
        path = list(self._walk(tokens[:-1], salt))
        self._touch(path)
        pages = [block.page for block in path]
        self.allocator.retain(pages)
        return pages

    def count_lookup(self, n_hit: int, n_tokens: int) -> None:
        """Book one admitted sequence: `n_hit` of its `n_tokens` prompt tokens came from the cache."""
        self.counters.hit_tokens += n_hit
        self.counters.missed_tokens += n_tokens - n_hit

    def insert(self, tokens: Sequence[int], pages: Sequence[int], salt: str | None = None) -> int:
        """Keep the full pages of a sequence; the number of pages that are new to the cache.

        The caller keeps its own hold on `pages`. A block that is cached already keeps the page it has.
        """
        n_full = len(tokens) // self.page_size
        assert len(pages) >= n_full, "a sequence has a page for every full block"
        if not n_full:
            return 0
        path = list(self._walk(tokens, salt))
        parent = path[-1] if path else self._root(salt)
        n_new = 0
        for index in range(len(path), n_full):
            block_tokens = tuple(tokens[index * self.page_size : (index + 1) * self.page_size])
            key = self._key(parent, block_tokens)
            if key in self._blocks:  # another block has this key: the newcomer is not cached
                break
            block = _Block(key, block_tokens, pages[index], parent)
            self.allocator.retain([block.page])
            self._blocks[key] = block
            self._by_age[block] = None
            parent.n_children += 1
            parent = block
            path.append(block)
            n_new += 1
        self._touch(path)
        return n_new

    def n_evictable(self, at_most: int) -> int:
        """How many pages `evict(at_most)` would free now."""
        return len(self._evictable(at_most))

    def evict(self, count: int) -> int:
        """Free up to `count` pages, least recently used leaves first, never one that a sequence reads."""
        evicted = self._evictable(count)
        self._remove(evicted)
        self.counters.evicted_pages += len(evicted)
        return len(evicted)

    def _evictable(self, at_most: int) -> list[_Block]:
        """The oldest blocks that no sequence reads, nor any block below them, children before their parents.

        A page that a sequence reads counts as used now: its path moves to the young end, so that a later call does not
        meet it again. The cost a page is therefore constant on average, however many pages are cached.
        """
        found: list[_Block] = []
        read: list[_Block] = []
        above_read: set[_Block] = set()
        for block in self._by_age:
            if len(found) >= at_most:
                break
            is_read = self.allocator.holders(block.page) > 1
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
        """Drop the blocks along `tokens` and all below them, also those that a sequence reads; how many there were."""
        doomed = dict.fromkeys(self._walk(tokens, salt))
        if not doomed:
            return 0
        for block in reversed(self._by_age):  # parents come first
            if block.parent in doomed:
                doomed[block] = None
        self._remove(list(doomed))
        return len(doomed)

    def _remove(self, blocks: Sequence[_Block]) -> None:
        for block in blocks:
            del self._by_age[block]
            del self._blocks[block.key]
            self.allocator.release([block.page])
            assert block.parent is not None
            block.parent.n_children -= 1
            if block.parent.parent is None and not block.parent.n_children:
                del self._roots[block.parent.salt]

    def clear(self) -> int:
        """Evict everything that no sequence reads; the number of pages freed."""
        return self.evict(self.n_pages)

    def _root(self, salt: str | None) -> _Block:
        if salt not in self._roots:
            # tagged and hashed on their own, so that no salt is mistaken for another or for the absence of one
            key = sha256(b"no salt" if salt is None else b"salt:" + salt.encode(errors="surrogatepass"))
            self._roots[salt] = _Block(key, (), -1, None, salt=salt)
        return self._roots[salt]

    def _key(self, parent: _Block, tokens: tuple[int, ...]) -> bytes:
        return self._digest(parent.key + struct.pack(f"<{len(tokens)}q", *tokens))

    def _walk(self, tokens: Sequence[int], salt: str | None) -> Iterator[_Block]:
        """Cached blocks along `tokens`, from the root down."""
        parent = self._roots.get(salt)
        for start in range(0, len(tokens) - self.page_size + 1, self.page_size):
            if parent is None:
                return
            block_tokens = tuple(tokens[start : start + self.page_size])
            block = self._blocks.get(self._key(parent, block_tokens))
            if block is None or block.parent is not parent or block.tokens != block_tokens:
                return
            yield block
            parent = block

    def _touch(self, path: Sequence[_Block]) -> None:
        for block in reversed(path):
            self._by_age.move_to_end(block)


def _path_to(block: _Block) -> list[_Block]:
    """The blocks from the first below the root to `block`."""
    path = [block]
    while (parent := path[-1].parent) is not None and parent.parent is not None:
        path.append(parent)
    return path[::-1]
