"""Cleaning: filters, languages, scrubbing, duplicates, splits, quarantine."""
