"""The decoder: a multi-query transformer whose every option a stock serving architecture can express.

Shape suffixes (Noam Shazeer, "Shape Suffixes"), on every tensor of rank one or more:
B batch of sequences, L query length, M memory length, T packed tokens, V vocabulary, D d_model, H query heads,
G key/value heads, K head dimension, F d_ff, N layers, P pages, S slots of a page.
"""
