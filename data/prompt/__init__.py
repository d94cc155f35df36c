"""Prompt templates: Prompt Poet files to the tokens of the dialogue format: python -m data.prompt."""
