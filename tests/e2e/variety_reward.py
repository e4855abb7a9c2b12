"""A reward that a policy loses as it collapses; a module of its own, for grading workers import it."""


def grade(response: str, answer: str) -> float:
    """1.0 for at least four different characters, else 0.0."""
    return float(len(set(response)) >= 4)
