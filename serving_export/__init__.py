"""Hugging Face export with parity checks, the reference engine with its prefix cache, the HTTP server."""

from recipes.interrupt import catch_interrupts
from recipes.openmp import limit_spinning

catch_interrupts()
limit_spinning()
