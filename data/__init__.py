"""Dialogue logs to packed, fingerprinted token shards: sources, tokenizer, format, packing, order, preferences."""

from recipes.interrupt import catch_interrupts
from recipes.openmp import sleep_while_waiting

catch_interrupts()
sleep_while_waiting()
