"""Export a bundle for stock engines and check it: python -m serving_export.export."""
