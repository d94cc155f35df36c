"""The served bundle: Hugging Face export with parity, the reference engine with its prefix cache, the HTTP server."""

from recipes.openmp import sleep_while_waiting

sleep_while_waiting()
