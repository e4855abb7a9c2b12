"""Where a response says its answer: on its last `Answer:` line, else in its last `\\boxed{}`.

Every function takes time linear in its text: the text is model output of any length.
"""

import re
from collections import deque
from collections.abc import Iterator

# The formula may begin on the next line, after $$ or \[.
_ANSWER_LINE = re.compile(r"(?i)\banswer(?:\*\*)?\s*:\s*(?:\*\*\s*)?(?:(?:\$\$|\\\[)\s*)?([^\n]+)")
# What may stand between two boxes that are one answer: \boxed{1} and \boxed{2}.
_BETWEEN_BOXES = re.compile(r"[\s$,;]*(?:(?:and|or|\\text\{\s*(?:and|or)\s*\})[\s$]*)?")


def closing_brace(text: str, opening: int) -> int:
    """Where the brace at `opening` is closed; -1 if nowhere. A brace after a backslash does not count."""
    depth, position = 0, opening
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return position
        position += 1
    return -1


def last_boxed(text: str) -> str | None:
    """What the last `\\boxed{}` holds; None if there is none, or if its brace is not closed."""
    start = text.rfind("\\boxed{")
    opening = start + len("\\boxed")
    end = closing_brace(text, opening) if start >= 0 else -1
    return text[opening + 1 : end] if end >= 0 else None


def _boxes(text: str) -> Iterator[tuple[int, int, str]]:
    """(start, end, content) of every closed box that is in no other box."""
    position = 0
    while (start := text.find("\\boxed{", position)) >= 0:
        opening = start + len("\\boxed")
        end = closing_brace(text, opening)
        if end < 0:
            return
        yield start, end + 1, text[opening + 1 : end]
        position = end + 1


def _boxed_answer(line: str) -> str | None:
    """The boxes of a line, joined as far as they are one enumeration up to its last box."""
    contents: list[str] = []
    last_end = -1
    for start, end, content in _boxes(line):
        if last_end >= 0 and not _BETWEEN_BOXES.fullmatch(line, last_end, start):
            contents.clear()
        contents.append(content)
        last_end = end
    return ", ".join(contents) if contents else None


def extract_answer(response: str) -> str | None:
    """The answer that a response gives, as it stands there; None if it gives none.

    Example: `extract_answer("So it is 3.\\nAnswer: $3$") == "$3$"`.
    """
    lines = deque(_ANSWER_LINE.finditer(response), maxlen=1)
    if lines:
        text = lines[0][1].strip()
        boxed = _boxed_answer(text)
        return text if boxed is None else boxed
    start = response.rfind("\\boxed{")
    if start < 0:
        return None
    # a box may go over several lines; others on the line where it begins may belong to it
    return _boxed_answer(response[response.rfind("\n", 0, start) + 1 :])
