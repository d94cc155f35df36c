"""The chat server and its engine: python -m serving_export.server."""
