"""Packed token shards: cutting, packing, the order of rows, mixtures, batches."""
