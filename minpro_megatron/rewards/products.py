"""The task of products: `347*581=` is answered with `201607`, which a tiny model can copy but not compute.

There are 810,000 products of two three-digit numbers. The policy may write one as a call of a calculator
(`minpro_megatron.environments.calculator`) and read the result before it answers. Nothing forbids it to answer at once.
"""

import random
import re

SMALLEST, LARGEST = 100, 999  # of the two operands

_PROMPT = re.compile(r"([0-9]{1,4})\*([0-9]{1,4})=")
_ANSWER = re.compile(r"[1-9][0-9]{0,8}")


def draw_prompt(generator: random.Random) -> str:
    """A product of two three-digit numbers. Example: `"347*581="`."""
    return f"{generator.randint(SMALLEST, LARGEST)}*{generator.randint(SMALLEST, LARGEST)}="


def worked(prompt: str) -> str:
    """The correct answer, such as `worked("347*581=") == "201607"`. Raises ValueError if the prompt is no product."""
    product = _PROMPT.fullmatch(prompt)
    if product is None:
        raise ValueError(f"prompt: {prompt!r} is not a product such as 347*581=")
    return str(int(product[1]) * int(product[2]))


def grade(response_text: str, answer: str) -> float:
    """1.0 if the last line of `response_text`, which is the policy's last turn, is exactly `answer`, else 0.0.

    Raises ValueError if `answer` itself is not a positive integer: no response could be correct.
    Example: `grade("347*581\\n201607", "201607") == 1.0`.
    """
    if not _ANSWER.fullmatch(answer):
        raise ValueError(f"answer: {answer!r} is not a positive integer of at most 9 digits; correct the row")
    return 1.0 if response_text.rpartition("\n")[2] == answer else 0.0
