"""Dialogue logs to packed, fingerprinted token shards: sources, tokenizer, format, packing, order, preferences."""

from recipes.openmp import sleep_while_waiting

sleep_while_waiting()
