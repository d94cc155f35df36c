"""Dialogue logs to packed, fingerprinted token shards: sources, tokenizer, format, packing, order, preferences."""
