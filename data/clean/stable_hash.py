"""Choices that are the same on every machine and in every process: a hash of strings, not Python's salted one."""

import hashlib


def stable_hash(*parts: str | int) -> int:
    """A 64-bit number that depends on the parts alone (their boundaries included)."""
    encoded = [str(part).encode("utf-8", "surrogatepass") for part in parts]
    whole = b"".join([len(part).to_bytes(8, "little") + part for part in encoded])
    return int.from_bytes(hashlib.sha256(whole).digest()[:8], "little")


def pseudonym(*parts: str | int) -> str:
    """A participant's id without the id itself: the same parts (the corpus, the id) give the same 16 hex digits."""
    return f"{stable_hash('participant', *parts):016x}"
