"""The dialogue format: messages and dialogues, as JSON and as tokens, and the tokenizer."""
