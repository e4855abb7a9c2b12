"""Rewards that grade what preflight tries and fail on what a policy says; a module of its own, for grading workers
import it."""

from itertools import pairwise

OPERATORS = "+-*/"


def on_some(response: str, answer: str) -> float:
    """1.0 for more than two characters that end with a digit. Raises for two operators in a row."""
    for first, second in pairwise(response):
        if first in OPERATORS and second in OPERATORS and response[-1] not in OPERATORS:
            raise RuntimeError(f"no grade for {first}{second}")
    return float(len(response) > 2 and response[-1:].isdigit())


def on_all(response: str, answer: str) -> float:
    """Raises unless the response is empty or says the answer."""
    if response and answer not in response:
        raise RuntimeError("no grade for a wrong answer")
    return float(bool(response))
