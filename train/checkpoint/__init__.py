"""Checkpoints: written whole or not at all, hashed, resumed from."""
