"""Text from outside made fit for a terminal: logs of processes, prompts and responses, contents of files.

A terminal acts on control characters: they move its cursor, hide what was printed, or set its title and clipboard.
"""

import unicodedata

# Control and format characters (the bidirectional ones among them), surrogates, private use, unassigned; line and
# paragraph separators: what a terminal acts on, or does not show.
_NOT_SHOWN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def visible(text: str) -> str:
    """`text` with every character that is not printed as itself spelt out, line breaks too: give it a line at a time.

    >>> visible("a\\x1b[2J")
    'a\\\\x1b[2J'
    """
    if text.isprintable():
        return text
    return "".join(_spelt_out(c) if unicodedata.category(c) in _NOT_SHOWN else c for c in text)


def _spelt_out(character: str) -> str:
    code = ord(character)
    wide = f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
    return _SHORT.get(character) or (f"\\x{code:02x}" if code <= 0xFF else wide)
