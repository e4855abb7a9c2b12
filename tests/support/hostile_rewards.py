"""Reward functions that take more than they may."""

import time


def spin(response_text: str, answer: str) -> float:
    """For ever, within one call into C, where no signal handler of Python would run."""
    return float(10**10**10)


def sleep(response_text: str, answer: str) -> float:
    """As many seconds as the response says, without computing anything."""
    time.sleep(float(response_text))
    return 1.0


def hog(response_text: str, answer: str) -> float:
    """More memory than there is for a grading process."""
    return float(len(bytearray(2**40 if response_text == "large" else 1)))


def three(response_text: str, answer: str) -> float:
    return 3.0


NUMBER = 3
