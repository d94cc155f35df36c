"""Reference counts stay exact, and no changed token, other salt or hash collision ever hits."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from model.inference.blocks import PageAllocator
from model.inference.prefix_cache import PrefixCache

PAGE = 2
TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=11)
SALTS = st.sampled_from([None, "", "None", "no salt", "tenant"])


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right)) if a != b), min(len(left), len(right)))


def store(cache: PrefixCache, tokens: list[int], salt: str | None = None) -> list[int]:
    """Compute a sequence from nothing, cache it, finish it; its pages."""
    pages = cache.allocator.allocate(-(-len(tokens) // PAGE))
    cache.insert(tokens, pages, salt)
    cache.allocator.release(pages)
    return pages


class PrefixCacheMachine(RuleBasedStateMachine):
    """Sequences come, match, insert and finish while pages are evicted; a plain dictionary says what is true."""

    N_PAGES = 24
    unit = 1

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache(PageAllocator(self.N_PAGES), PAGE)
        self.running: list[tuple[list[int], list[int], str | None]] = []
        # which (salt, tokens up to the end of the page) a page was last filled with
        self.content: dict[int, tuple[str | None, tuple[int, ...]]] = {}

    @rule(tokens=TOKENS, salt=SALTS)
    def start(self, tokens: list[int], salt: str | None) -> None:
        tokens = [token * self.unit for token in tokens]
        pages = self.cache.match(tokens, salt)
        assert len(pages) * PAGE < len(tokens)
        for index, page in enumerate(pages):
            assert self.content[page] == (salt, tuple(tokens[: (index + 1) * PAGE]))
        missing = -(-len(tokens) // PAGE) - len(pages)
        if missing > self.cache.allocator.n_free:
            self.cache.allocator.release(pages)
            return
        fresh = self.cache.allocator.allocate(missing)
        for index, page in enumerate(fresh, start=len(pages)):
            self.content[page] = (salt, tuple(tokens[: (index + 1) * PAGE]))
        self.running.append((tokens, pages + fresh, salt))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def insert(self, data: st.DataObject) -> None:
        tokens, pages, salt = data.draw(st.sampled_from(self.running))
        self.cache.insert(tokens, pages, salt)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.running) - 1))
        self.cache.allocator.release(self.running.pop(number)[1])

    @rule(count=st.integers(0, 8))
    def evict(self, count: int) -> None:
        possible, free = self.cache.n_evictable(self.N_PAGES), self.cache.allocator.n_free
        evicted = self.cache.evict(count)
        assert evicted == min(count, possible)
        assert self.cache.allocator.n_free == free + evicted

    @rule(tokens=TOKENS, salt=SALTS)
    def forget(self, tokens: list[int], salt: str | None) -> None:
        tokens = [token * self.unit for token in tokens]
        found = self.cache.match([*tokens, 0], salt)
        self.cache.allocator.release(found)
        before = self.cache.n_pages
        below = {page for page, (own, path) in self.content.items() if found and own == salt
                 and path[:PAGE] == tuple(tokens[:PAGE]) and page in self.cached_pages()}  # fmt: skip
        n_forgotten = self.cache.forget(tokens, salt)
        assert n_forgotten == len(below)
        assert n_forgotten >= len(found)
        assert before - self.cache.n_pages == n_forgotten
        assert self.cache.match([*tokens, 0], salt) == []

    def cached_pages(self) -> list[int]:
        return [block.page for block in self.cache._by_age]

    @invariant()
    def reference_counts_are_exact(self) -> None:
        cached = self.cached_pages()
        for page in range(self.N_PAGES):
            readers = sum(pages.count(page) for _, pages, _ in self.running)
            assert self.cache.allocator.refcount(page) == readers + cached.count(page)

    @invariant()
    def the_tree_is_consistent(self) -> None:
        ages = {block: age for age, block in enumerate(self.cache._by_age)}
        in_tree = list(self.cache._roots.values())
        for block in in_tree:
            in_tree += block.children.values()
        assert set(in_tree[len(self.cache._roots) :]) == set(ages)
        for block, age in ages.items():
            parent = block.parent
            assert parent is not None
            assert parent in self.cache._roots.values() if parent.page < 0 else age < ages[parent]
            assert parent.children[block.tokens] is block

    def teardown(self) -> None:
        for _, pages, _ in self.running:
            self.cache.allocator.release(pages)
        self.cache.evict(10**9)
        assert self.cache.allocator.n_free == self.N_PAGES


class CollidingHashMachine(PrefixCacheMachine):
    """The same with tokens that all have the hash 0 in Python."""

    unit = sys.hash_info.modulus


TestPrefixCache = PrefixCacheMachine.TestCase
TestPrefixCache.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestCollidingHash = CollidingHashMachine.TestCase
TestCollidingHash.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


@given(tokens=st.lists(st.integers(0, 5), min_size=2, max_size=20), data=st.data())
@settings(deadline=None)
def test_changed_token_never_hits_past_it(tokens: list[int], data: st.DataObject) -> None:
    cache = PrefixCache(PageAllocator(32), PAGE)
    pages = store(cache, tokens)
    place = data.draw(st.integers(0, len(tokens) - 1))
    changed = [*tokens[:place], 9, *tokens[place + 1 :], 7]
    hit = cache.match(changed)
    assert hit == pages[: place // PAGE]


@given(tokens=TOKENS)
@settings(deadline=None)
def test_the_last_token_is_never_matched(tokens: list[int]) -> None:
    cache = PrefixCache(PageAllocator(32), PAGE)
    pages = store(cache, tokens)
    assert cache.match(tokens) == pages[: (len(tokens) - 1) // PAGE]


@given(tokens=TOKENS, salts=st.lists(SALTS, min_size=2, max_size=2, unique=True))
@settings(deadline=None)
def test_other_salt_never_hits(tokens: list[int], salts: list[str | None]) -> None:
    cache = PrefixCache(PageAllocator(32), PAGE)
    store(cache, tokens, salts[0])
    assert cache.match([*tokens, 1], salts[1]) == []
    assert len(cache.match([*tokens, 1], salts[0])) == len(tokens) // PAGE


def test_least_recently_used_leaf_goes_first() -> None:
    cache = PrefixCache(PageAllocator(32), PAGE)
    shared, left, right = [1, 1], [1, 1, 2, 2], [1, 1, 3, 3]
    for tokens in (left, right):
        store(cache, tokens)
    cache.allocator.release(cache.match([*left, 0]))
    assert cache.evict(1) == 1
    assert len(cache.match([*left, 0])) == 2
    assert len(cache.match([*right, 0])) == len(shared) // PAGE


def test_forget_drops_the_whole_path_and_all_below_it() -> None:
    cache = PrefixCache(PageAllocator(32), PAGE)
    for tokens in ([1, 2, 3, 4, 5, 6], [1, 2, 7, 8], [9, 9]):
        store(cache, tokens)
    in_use = cache.match([1, 2, 7, 8, 0])
    assert cache.forget([1, 2, 3, 4]) == 4
    assert cache.match([1, 2, 0]) == []
    assert cache.n_pages == 1, "another path stays"
    assert cache.allocator.n_free == 32 - 1 - len(in_use), "pages in use stay allocated"


def test_page_in_use_is_never_evicted() -> None:
    cache = PrefixCache(PageAllocator(8), PAGE)
    store(cache, [1, 2, 3, 4])
    pages = cache.match([1, 2, 9])
    assert cache.n_evictable(8) == 1
    assert cache.evict(8) == 1
    assert cache.match([1, 2, 3]) == pages


def test_eviction_looks_at_as_many_pages_as_it_frees(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many pages are cached or read; of the pages read, it meets each once."""
    n_pages, n_read = 400, 100
    cache = PrefixCache(PageAllocator(n_pages), PAGE)
    for number in range(n_pages):
        store(cache, [number, number])
    cache.allocator.retain([block.page for block in list(cache._by_age)[:n_read]])
    looks = list[int]()
    refcount = cache.allocator.refcount
    monkeypatch.setattr(cache.allocator, "refcount", lambda page: looks.append(page) or refcount(page))
    assert cache.evict(1) == 1
    assert len(looks) == n_read + 1
    looks.clear()
    assert [cache.n_evictable(1) + cache.evict(1) for _ in range(50)] == [2] * 50
    assert len(looks) == 100
    assert cache.evict(n_pages) == n_pages - n_read - 51


def test_a_tenant_without_pages_is_forgotten() -> None:
    cache = PrefixCache(PageAllocator(8), PAGE)
    store(cache, [1, 2, 3, 4], "one")
    store(cache, [1, 2], "other")
    assert cache.evict(2) == 2
    assert set(cache._roots) == {"other"}
    assert cache.forget([1, 2], "other") == 1
    assert not cache._roots


def test_counters() -> None:
    cache = PrefixCache(PageAllocator(8), PAGE)
    cache.count_lookup(4, 10)
    store(cache, [1, 2])
    cache.evict(10**9)
    assert (cache.counters.hit_tokens, cache.counters.missed_tokens, cache.counters.evicted_pages) == (4, 6, 1)
