"""Which records are kept and what of them: filters, languages, scrubbing, duplicates, splits, quarantine."""
