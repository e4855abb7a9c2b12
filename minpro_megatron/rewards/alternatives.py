"""True answers of which any one is right, as one text: a JSON list of texts, `["\\frac{1}{2}", "0.5"]`.

No answer in mathematics begins with a bracket and a quotation mark, so such a text is never one answer.
"""

import json
from collections.abc import Sequence


def alternatives(answer: str) -> list[str]:
    """The answers that `answer` holds: those of a JSON list of texts, or `answer` alone.

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
    """What `alternatives` reads again; one answer stays as it is."""
    return answers[0] if len(answers) == 1 else json.dumps(list(answers), ensure_ascii=False)
