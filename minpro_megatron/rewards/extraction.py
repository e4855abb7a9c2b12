"""Finds a response's answer: on its last `Answer:` line or in its last `\\boxed{}`, whichever comes last.

Nothing inside a think block counts. Every function takes time linear in its text, which is model output of any length.
"""

import re
from dataclasses import dataclass

_THINK_TAG = re.compile(
    r"(?i)<(?P<end>/?)(?:think|thinking|thoughts?|reasoning|scratchpad)>|\[(?P<end_2>/?)THINK\]|◁(?P<end_3>/?)think▷"
    r"|<\|channel\|>(?:(?P<end_4>final)|analysis|commentary)(?:<\|message\|>)?"
)
_THINK_MARKS = ("think", "THINK", "Think", "thought", "reasoning>", "scratchpad>", "<|channel|>")
_SPACES = re.compile(r"[^\S\n]{2,}|[^\S\n ]")
# An answer line starts at the beginning of a line; every quantifier is bounded, and runs of spaces are one space.
_ANSWER = ("answer", "Answer", "ANSWER")
_LEADING_WORD = (
    r"(?:so|thus|hence|therefore|then|finally|the|my|our|final|correct|short|numerical|numeric|exact|overall)"
)
_ANSWER_LINE = re.compile(
    rf"(?i)[ >#*_`~•-]{{0,12}}(?:{_LEADING_WORD}[ ,*_]{{1,3}}){{0,5}}answers?"
    r"(?: (?:is|are)| \([^()\n]{1,40}\))?[ *_`]{0,5}[:：][ *_`]{0,8}"
)
_FENCE = re.compile(r" ?`{3}[a-zA-Z]{0,12} ?")
_DECORATION = " -*_=#>~"
_DISPLAYS = (("$$", "$$"), ("\\[", "\\]"))
_END_OF_FORMULA = re.compile(r"\$|\n|\Z")
MAX_DISPLAY_CHARS = 2000
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])\s{0,3}")
# Without braces a box contains the rest of its formula, or outside a formula a number or a command with its arguments.
_BARE_BOX = re.compile(
    r"[+-]?\d(?:[\d.,/]{0,30}\d)?|\\[a-zA-Z]{1,20}(?:\{[^{}\n]{0,200}\}){1,3}|\\[a-zA-Z]{1,20}|[a-zA-Z](?![a-zA-Z])"
)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
# Text allowed between two boxes that are one answer: \boxed{1} and \boxed{2}, x=\boxed{1} or x=\boxed{2}.
_BETWEEN_BOXES = re.compile(
    r"[\s$,;]{0,12}(?:(?:and|or|\\text\{ ?(?:and|or) ?\})[\s$]{0,6})?(?:[a-zA-Z](?:_\w)? ?= ?)?(?:\\q?quad ?)?"
)


@dataclass(frozen=True)
class _Box:
    """Its position in the text; `content` is None if the box is not closed."""

    start: int
    end: int
    content: str | None


def last_boxed(text: str) -> str | None:
    """The content of the last box; None if there is none, or if its brace is not closed."""
    boxes = _boxes(text)
    return boxes[-1].content if boxes else None


def _closing_braces(text: str, start: int) -> dict[int, int]:
    closing: dict[int, int] = {}
    opened: list[int] = []
    for match in _BRACE.finditer(text, start):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            closing[opened.pop()] = match.start()
    return closing


def _boxes(text: str) -> list[_Box]:
    """All boxes that are not inside another box. Boxes after an unclosed box on the same line count as inside it."""
    first = _BOX.search(text)
    if first is None:
        return []
    closing = _closing_braces(text, first.start())
    boxes: list[_Box] = []
    reached = 0
    for match in _BOX.finditer(text, first.start()):
        if match.start() < reached:
            continue
        box = _box_at(text, match, closing)
        if box is not None:
            boxes.append(box)
            reached = box.end
    return boxes


def _box_at(text: str, match: re.Match[str], closing: dict[int, int]) -> _Box | None:
    """None if the command is only mentioned, without content."""
    start, opening = match.start(), match.end()
    if text[opening : opening + 1] == "{":
        end = closing.get(opening)
        if end is not None:
            return _Box(start, end + 1, _without_inner_boxes(text[opening + 1 : end].strip()))
        line_end = text.find("\n", opening)
        return _Box(start, line_end if line_end >= 0 else len(text), None)
    line_start = max(text.rfind("\n", 0, start) + 1, start - MAX_DISPLAY_CHARS)
    if text.count("$", line_start, start) % 2:
        end = _END_OF_FORMULA.search(text, opening)
        content = text[opening : end.start()] if end else text[opening:]
        return _Box(start, opening + len(content), content.strip())
    bare = _BARE_BOX.match(text, opening)
    return _Box(start, bare.end(), bare[0]) if bare else None


def _without_inner_boxes(content: str) -> str:
    """`x = \\boxed{5}` as `x = {5}`, and `\\boxed{5}` as `5`."""
    if not _BOX.search(content):
        return content
    closing = _closing_braces(content, 0)
    pieces: list[str] = []
    position = 0
    for match in _BOX.finditer(content):
        end = closing.get(match.end())
        if match.start() == 0 and end == len(content) - 1:
            pieces.append(content[match.end() + 1 : end])
            position = len(content)
            break
        pieces.append(content[position : match.start()])
        position = match.end()
    text = "".join(pieces) + content[position:]
    return _without_inner_boxes(text.strip()) if len(text) < len(content) else text


def _enumerated(text: str, boxes: list[_Box]) -> str | None:
    """The last box, joined with earlier boxes on its line as far as they form one enumeration. None if not closed.

    Repetitions of the same box count as one answer.
    """
    last = boxes[-1]
    if last.content is None:
        return None
    line_start = text.rfind("\n", 0, last.start) + 1
    contents = [last.content]
    following = last
    for box in reversed(boxes[:-1]):
        if box.start < line_start or box.content is None:
            break
        if following.start - box.end > 40 or not _BETWEEN_BOXES.fullmatch(text, box.end, following.start):
            break
        contents.append(box.content)
        following = box
    return contents[0] if len(set(contents)) == 1 else ", ".join(reversed(contents))


def _with_single_spaces(text: str) -> str:
    if text.isascii() and not any(space in text for space in ("  ", "\t", "\r", "\v", "\f")):
        return text  # most responses; searching is faster than the pattern
    return _SPACES.sub(" ", text)


def _outside_of_thoughts(response: str) -> str:
    """The response without its think blocks, closed or not; a block may have started in the prompt."""
    if not any(mark in response for mark in _THINK_MARKS):
        return response
    pieces: list[str] = []
    position, is_inside = 0, False
    for tag in _THINK_TAG.finditer(response):
        if any(tag.groups()):
            if not is_inside:
                pieces.clear()
            is_inside = False
        else:
            if not is_inside:
                pieces.append(response[position : tag.start()])
            is_inside = True
        position = tag.end()
    if not is_inside:
        pieces.append(response[position:])
    return "\n".join(pieces)


def _answer_text(text: str, start: int) -> str:
    """The text of an answer line from `start` on: the rest of the line, the text after a heading, or a display."""
    is_fenced = False
    while (end := text.find("\n", start)) >= 0:  # skip lines that consist only of rules, fences and emphasis
        line = text[start:end]
        is_fenced = is_fenced or _FENCE.fullmatch(line) is not None
        if line.strip(_DECORATION) and not _FENCE.fullmatch(line):
            break
        start = end + 1
    rest = text[start : start + MAX_DISPLAY_CHARS].lstrip()
    if is_fenced:
        return rest.partition("```")[0].strip()
    for opening, closing in _DISPLAYS:
        if rest.startswith(opening) and closing in rest[len(opening) :]:
            return rest[len(opening) :].partition(closing)[0].strip()
    line, _, following = rest.partition("\n")
    if line.count("\\begin{") > line.count("\\end{") and "\\end{" in following:
        head, _, tail = following.partition("\\end{")
        return f"{line}\n{head}\\end{{{tail.partition(chr(10))[0]}".strip()
    return line.strip()


def _last_answer_line(text: str) -> re.Match[str] | None:
    end = len(text)
    while (position := max(text.rfind(word, 0, end) for word in _ANSWER)) >= 0:
        end = text.rfind("\n", 0, position) + 1
        if match := _ANSWER_LINE.match(text, end):
            return match
    return None


def extract_answer(response: str) -> str | None:
    """The answer in a response, unchanged; None if there is none, or if the response ends inside its last box.

    Example: `extract_answer("So it is 3.\\nAnswer: $3$") == "$3$"`.
    """
    text = _with_single_spaces(_outside_of_thoughts(response))
    line = _last_answer_line(text)
    boxes = _boxes(text)
    if boxes and (line is None or boxes[-1].start > line.start()):
        return _enumerated(text, boxes if line is None else [box for box in boxes if box.start > line.start()])
    return (_answer_text(text, line.end()) or None) if line else None
