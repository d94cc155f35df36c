"""Hashes of strings that are the same on every machine and in every process, unlike Python's salted hash."""

import hashlib


def stable_hash(*parts: str | int) -> int:
    """A 64-bit hash of the parts and their boundaries."""
    encoded = [str(part).encode("utf-8", "surrogatepass") for part in parts]
    whole = b"".join([len(part).to_bytes(8, "little") + part for part in encoded])
    return int.from_bytes(hashlib.sha256(whole).digest()[:8], "little")


def pseudonym(*parts: str | int) -> str:
    """Pseudonym of an id: 16 hex digits that depend on the parts (the salt or corpus, and the id)."""
    return f"{stable_hash('participant', *parts):016x}"
