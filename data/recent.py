"""A map that forgets what was least recently used once it holds more than it may."""

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """Values with a weight each; those it holds never weigh more than `capacity` together. For any thread."""

    def __init__(self, capacity: int):
        self.weight = 0
        self._capacity = capacity
        self._held: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: K) -> V | None:
        """The value of `key`, which is then the most recently used; None when it is not known."""
        with self._lock:
            held = self._held.get(key)
            if held is None:
                return None
            self._held.move_to_end(key)
            return held[0]

    def put(self, key: K, value: V, weight: int) -> None:
        """Remember `value`, and forget the least recently used when there is no room."""
        with self._lock:
            old = self._held.pop(key, None)
            self.weight += weight - (old[1] if old is not None else 0)
            self._held[key] = value, weight
            while self.weight > self._capacity:
                _, (_, forgotten) = self._held.popitem(last=False)
                self.weight -= forgotten
