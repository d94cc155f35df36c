"""Evaluation: held-out loss, next-reply ranking, the reward model, replies; every figure with an interval."""

from recipes.interrupt import catch_interrupts
from recipes.openmp import limit_spinning

catch_interrupts()
limit_spinning()
