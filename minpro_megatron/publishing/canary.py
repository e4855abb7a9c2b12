"""The canaries: after a publication each server continues a few prompts greedily, and the trainer computes the
log-probs of the same tokens under its own weights.

Equal checksums show that the weights have arrived; canaries show that the server computes the same function with them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from minpro_megatron.serving.control import GreedyAnswer


@dataclass(frozen=True)
class Difference:
    """|server's - trainer's log-prob| of the canaries' tokens, in nats."""

    mean: float
    max: float


# (index of a prompt among the lease's prompts, a continuation of it).
Continuation = tuple[int, tuple[int, ...]]


def distinct_continuations(answers: Mapping[int, Sequence[GreedyAnswer]]) -> list[Continuation]:
    """The distinct continuations from the servers, in a fixed order. `answers` has one answer per prompt, by server
    index. If the engines round identically, there is usually one continuation per prompt."""
    return sorted({pair for own in answers.values() for pair in _continuations(own)})


def differences(
    answers: Mapping[int, Sequence[GreedyAnswer]],
    continuations: Sequence[Continuation],
    log_probs: Sequence[np.ndarray],
) -> dict[int, Difference]:
    """The difference of each server over the tokens of all its continuations, by server index. `log_probs` are the
    trainer's for each of `continuations`. NaN stays NaN."""
    of_continuation = dict(zip(continuations, log_probs, strict=True))
    found = {}
    for index, own in answers.items():
        theirs = np.concatenate([answer.log_probs for answer in own])
        ours = np.concatenate([of_continuation[pair] for pair in _continuations(own)])
        off = np.abs(theirs - ours)
        found[index] = Difference(float(off.mean()), float(off.max()))
    return found


def _continuations(answers: Sequence[GreedyAnswer]) -> list[Continuation]:
    return [(prompt, tuple(answer.token_ids)) for prompt, answer in enumerate(answers)]
