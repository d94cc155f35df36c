"""Evaluation: held-out loss, next-reply ranking, engagement proxies with error bars, the report."""

from recipes.interrupt import catch_interrupts
from recipes.openmp import sleep_while_waiting

catch_interrupts()
sleep_while_waiting()
