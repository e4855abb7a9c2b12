"""Instructions that data sets add to their questions. They are removed because the run has its own (data.instruction),
and two of them would ask the policy for two formats.
"""

import re
from collections.abc import Sequence

from minpro_megatron.config.instructions import DAPO_AFTER, DAPO_BEFORE

# Each comes before or after the question, with any white space.
_SENTENCES = (
    'Let\'s think step by step and output the final answer after "####".',  # verl's GSM8K
    "Let's think step by step and output the final answer within \\boxed{}.",  # verl's MATH, DeepScaleR
    "Please reason step by step, and put your final answer within \\boxed{}.",  # Qwen, DeepSeek
    "Present the answer in LaTex format: \\boxed{Your answer}",  # PRIME
)
# An ending or a beginning of at least this length that this number of prompts share may be an unknown instruction.
MIN_SHARING_PROMPTS = 10
MIN_SHARED_CHARS = 20


def _in_any_space(text: str) -> str:
    return r"\s+".join(map(re.escape, text.split()))


_ANY_SENTENCE = "|".join(map(_in_any_space, _SENTENCES))
_BEFORE = re.compile(rf"\s*(?:{_ANY_SENTENCE})(?=\s)")
_AFTER = re.compile(rf"(?:{_ANY_SENTENCE})\s*\Z")
_DAPO = re.compile(rf"\s*{_in_any_space(DAPO_BEFORE)}(?P<question>.*){_in_any_space(DAPO_AFTER)}\s*\Z", re.DOTALL)


def has_dapo_instruction(text: str) -> bool:
    return _DAPO.match(text) is not None


def is_instruction(text: str) -> bool:
    """Whether `text` is exactly one of the known instructions."""
    return re.fullmatch(rf"\s*(?:{_ANY_SENTENCE})\s*", text) is not None


def without_instructions(text: str) -> str:
    """The question without instruction and surrounding white space; the text of an instruction alone becomes empty.

    >>> without_instructions('How many? Let\\'s think step by step and output the final answer after "####".')
    'How many?'
    """
    while True:
        dapo = _DAPO.match(text)
        inner = dapo["question"] if dapo else _AFTER.sub("", _BEFORE.sub("", text, count=1))
        if inner == text:
            return text.strip()
        text = inner


def shared_ends(questions: Sequence[str]) -> list[str]:
    """The beginning and the ending that at least MIN_SHARING_PROMPTS questions all share, cut at white space, if they
    have MIN_SHARED_CHARS characters: probably an unknown instruction."""
    if len(questions) < MIN_SHARING_PROMPTS:
        return []
    beginning = _common_beginning(questions).rpartition(" ")[0].strip()
    ending = _common_beginning([text[::-1] for text in questions])[::-1].partition(" ")[2].strip()
    return [text for text in (beginning, ending) if len(text) >= MIN_SHARED_CHARS]


def _common_beginning(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)  # in sorted order these two have the shortest common beginning
    length = next(
        (place for place, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first)
    )
    return first[:length]
