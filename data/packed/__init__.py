"""Packed token shards: splitting, packing, row order, mixtures, batches."""
