"""Reward functions that take more than they may."""


def spin(response_text: str, answer: str) -> float:
    """For ever, within one call into C, where no signal handler of Python would run."""
    return float(10**10**10)


def hog(response_text: str, answer: str) -> float:
    """More memory than there is for a grading process."""
    return float(len(bytearray(2**40 if response_text == "large" else 1)))


def three(response_text: str, answer: str) -> float:
    return 3.0


NUMBER = 3
