"""Dialogue logs to packed, fingerprinted token shards: sources, tokenizer, format, packing, order, preferences."""

from recipes.interrupt import catch_interrupts
from recipes.openmp import limit_spinning

catch_interrupts()
limit_spinning()
