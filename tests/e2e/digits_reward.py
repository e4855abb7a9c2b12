"""A reward that a model of random weights earns now and then; a module of its own, for grading workers import it."""


def grade(response: str, answer: str) -> float:
    """1.0 for more than two characters that end with a digit, else 0.0."""
    return float(len(response) > 2 and response[-1:].isdigit())
