"""Makes external text safe for a terminal or a page: logs of processes, prompts and responses, contents of files.

A terminal executes control characters: they move its cursor, hide printed text, or set its title and clipboard. A
browser hides some and reorders text at others, and some cannot be encoded.
"""

import unicodedata

# Control and format characters (including bidirectional ones), surrogates, private use, unassigned, and line and
# paragraph separators: characters that a terminal or a browser executes or does not show.
_NOT_SHOWN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def visible(text: str, keep: str = "") -> str:
    """`text` with every character that is not printable replaced by its escape sequence, including line breaks, except
    the characters in `keep`. For a terminal, pass one line at a time; a page keeps line breaks and tabs.

    >>> visible("a\\x1b[2J")
    'a\\\\x1b[2J'
    """
    if text.isprintable():
        return text
    return "".join(_escaped(c) if c not in keep and unicodedata.category(c) in _NOT_SHOWN else c for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    wide = f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
    return _SHORT.get(character) or (f"\\x{code:02x}" if code <= 0xFF else wide)
