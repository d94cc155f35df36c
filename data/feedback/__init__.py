"""What a product logs of its users, as preference pairs and scorer labels: python -m data.feedback."""
