"""Preference pairs and scorer labels from a product's feedback log: python -m data.feedback."""
