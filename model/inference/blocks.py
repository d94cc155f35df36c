"""Reference-counted pages of the KV cache."""

from __future__ import annotations

from collections.abc import Iterable


class OutOfPages(RuntimeError):  # noqa: N818 (reads as what happened)
    """The cache has fewer free pages than requested."""


class PageAllocator:
    """Page allocator with reference counts; a page is free when its refcount drops to zero."""

    def __init__(self, n_pages: int):
        self.n_pages = n_pages
        self._free = list(range(n_pages - 1, -1, -1))
        self._refcounts = [0] * n_pages

    @property
    def n_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Allocate `count` pages with refcount 1. Raises OutOfPages, allocating none, when there are not enough."""
        if count > len(self._free):
            raise OutOfPages(f"{count} cache pages requested, {len(self._free)} of {self.n_pages} are free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._refcounts[page] = 1
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """Increment the refcount of each page."""
        for page in pages:
            assert self._refcounts[page] > 0, f"page {page} is free"
            self._refcounts[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Decrement the refcount of each page."""
        for page in pages:
            assert self._refcounts[page] > 0, f"page {page} is free"
            self._refcounts[page] -= 1
            if not self._refcounts[page]:
                self._free.append(page)

    def refcount(self, page: int) -> int:
        return self._refcounts[page]
