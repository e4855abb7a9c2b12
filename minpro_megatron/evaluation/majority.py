"""maj@k: how often the most frequent answer among k of a prompt's n samples is correct."""

import re
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

NUM_DRAWS = 200
RIGHT, NO_ANSWER = 0, -1

_IGNORED = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[,;:!]|\$|\s")
_FRACTION = re.compile(r"(-?)\\frac\{(\d+)\}\{(\d+)\}")
_NUMBER = re.compile(r"-?\d+(\.\d+)?|-?\d+/\d+")
_THOUSANDS = re.compile(r"-?\d{1,3}(,\d{3})+(\.\d+)?")


def normalised(answer: str) -> str:
    """A spelling shared by equal plain numbers. Other text loses only white space and LaTeX's spacing commands.

    >>> normalised(r"\\dfrac{1}{2}"), normalised("0.50"), normalised("1,000"), normalised("x + 1 .")
    ('1/2', '1/2', '1000', 'x+1')
    """
    text = _IGNORED.sub("", answer.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")).rstrip(".")
    text = _FRACTION.sub(r"\1\2/\3", text)
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    if _NUMBER.fullmatch(text) and not re.search(r"/0+$", text):
        return str(Fraction(text))
    return text


def votes(answers: Sequence[str | None], is_right: Sequence[bool]) -> np.ndarray:
    """The samples' answers as classes, int64 [samples]: RIGHT, NO_ANSWER, or a number for each other answer.

    Right answers are equal whatever their spelling, because the grader found each equal to the reference. Wrong answers
    are compared as text: if one value has several spellings that `normalised` does not unify, its votes are split.
    """
    known: dict[str, int] = {}
    return np.asarray(
        [
            RIGHT if right else NO_ANSWER if answer is None else known.setdefault(normalised(answer), len(known) + 1)
            for answer, right in zip(answers, is_right, strict=True)
        ]
    )


def majority_at_k(votes_PN: np.ndarray, ks: Sequence[int], seed: int, num_draws: int = NUM_DRAWS) -> np.ndarray:
    """maj@k of every prompt, float64 [prompts, ks]: the mean over `num_draws` draws of k samples without replacement.

    Exact for k = 1 and k = n. Each of m equally frequent answers counts 1 / m. Samples without an answer have no vote,
    and a draw without any answer is wrong.
    """
    generator = np.random.default_rng(seed)
    num_samples = votes_PN.shape[1]
    draws = np.broadcast_to(np.arange(num_samples), (num_draws, num_samples))
    return np.stack([_of_prompt(row, ks, generator.permuted(draws, axis=1)) for row in votes_PN])


def _of_prompt(votes_N: np.ndarray, ks: Sequence[int], draws_DN: np.ndarray) -> np.ndarray:
    # NO_ANSWER becomes a last class, which is then removed
    classes = np.where(votes_N == NO_ANSWER, votes_N.max(initial=RIGHT) + 1, votes_N)
    one_hot = np.eye(int(classes.max()) + 1, dtype=np.int16)[:, : int(votes_N.max(initial=RIGHT)) + 1][classes]
    counts = one_hot[draws_DN].cumsum(axis=1)[:, np.asarray(ks) - 1]  # [draws, ks, classes]
    most = counts.max(axis=-1)
    num_tied = (counts == most[..., None]).sum(axis=-1)
    won = np.where((counts[..., RIGHT] == most) & (most > 0), 1 / num_tied, 0.0).mean(axis=0)
    return np.where(np.asarray(ks) == 1, (votes_N == RIGHT).mean(), won)
