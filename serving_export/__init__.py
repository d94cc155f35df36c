"""The served bundle: Hugging Face export with parity, the reference engine with its prefix cache, the HTTP server."""
