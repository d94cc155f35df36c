"""Untrusted text on a terminal: control characters that move the cursor, recolor or reorder text are made visible."""

_CONTROLS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {127: "\u2421"}
_CONTROLS |= {code: f"\\x{code:02x}" for code in range(0x80, 0xA0)}
_DIRECTIONS = {code: f"\\u{code:04x}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F)}
_SHOWN = _CONTROLS | _DIRECTIONS


def visible(text: str) -> str:
    """The text with control characters as symbols (an escape is U+241B) and directional formatting characters as
    escapes; line feeds and tabs stay."""
    return text.translate(_SHOWN)
