"""The canary: after new weights, each server continues a prompt, and the trainer says what its weights make of that."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from minpro_megatron.serving.control import GreedyAnswer


@dataclass(frozen=True)
class Difference:
    """|server's - trainer's log-prob| of a canary's tokens, in nats."""

    mean: float
    max: float


def distinct_responses(answers: Mapping[int, GreedyAnswer]) -> list[list[int]]:
    """The different continuations that the servers gave, in a fixed order: mostly one, where engines round alike."""
    return [list(tokens) for tokens in sorted({tuple(answer.token_ids) for answer in answers.values()})]


def differences(
    answers: Mapping[int, GreedyAnswer], responses: Sequence[Sequence[int]], log_probs: Sequence[np.ndarray]
) -> dict[int, Difference]:
    """How far each server is off, by its index; `log_probs` are the trainer's of each of `responses`. NaN stays NaN."""
    of_response = {tuple(response): own for response, own in zip(responses, log_probs, strict=True)}
    found = {}
    for index, answer in answers.items():
        off = np.abs(np.asarray(answer.log_probs) - of_response[tuple(answer.token_ids)])
        found[index] = Difference(float(off.mean()), float(off.max()))
    return found
