"""One small module a corpus: each turns raw records into `Dialogue` records."""
