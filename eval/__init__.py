"""Evaluation: held-out loss, next-reply ranking, engagement proxies with error bars, the report."""

from recipes.openmp import sleep_while_waiting

sleep_while_waiting()
