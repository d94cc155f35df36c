"""Preference pairs for training."""
