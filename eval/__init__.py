"""Evaluation: held-out loss, next-reply ranking, the reward model, replies; every figure with an interval."""

from recipes.interrupt import catch_interrupts
from recipes.openmp import sleep_while_waiting

catch_interrupts()
sleep_while_waiting()
