"""Compare training runs arm by arm and seed by seed: python -m eval.ablation."""
