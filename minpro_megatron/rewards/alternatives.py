"""Several correct answers, any of which is accepted, as one text: a JSON list of texts, `["\\frac{1}{2}", "0.5"]`.

No answer in mathematics begins with a bracket and a quotation mark, so such a text is never a single answer.
"""

import json
from collections.abc import Sequence


def alternatives(answer: str) -> list[str]:
    """The answers in `answer`: the elements of a JSON list of texts, or `answer` alone.

    >>> alternatives('["1/2", "0.5"]'), alternatives("[1, 2]")
    (['1/2', '0.5'], ['[1, 2]'])
    """
    text = answer.strip()
    if text.startswith("[") and text.endswith("]") and text[1:].lstrip().startswith('"'):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return [answer]
        if isinstance(found, list) and all(isinstance(part, str) and part.strip() for part in found):
            return found
    return [answer]


def as_one_text(answers: Sequence[str]) -> str:
    """The text from which `alternatives` reads the answers; a single answer is unchanged."""
    return answers[0] if len(answers) == 1 else json.dumps(list(answers), ensure_ascii=False)
