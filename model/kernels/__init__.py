"""Triton kernels for the operations between a block's matrix products: one read and one write of each tensor."""
