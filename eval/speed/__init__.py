"""Speed against named peers, on the same device in one run."""
