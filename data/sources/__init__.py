"""Readers of corpora and log formats, one module each: raw records to `Dialogue` records."""
