"""Evaluation: held-out loss, next-reply ranking, engagement proxies with error bars, the report."""
