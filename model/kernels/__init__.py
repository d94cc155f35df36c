"""Triton kernels of the training block: what lies between its matrix products, each read and written once."""
