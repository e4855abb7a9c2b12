"""An evaluation's figures against its stored samples, computed here in another way."""

import math
from collections import Counter
from itertools import combinations
from statistics import fmean, stdev

import pytest

from minpro_megatron.evaluation.samples import SampledResponse
from minpro_megatron.evaluation.scores import Scores


def check_figures(scores: Scores, samples: list[list[SampledResponse]]) -> None:
    """Asserts that the figures of the only benchmark follow from its `samples`, as many of every prompt, of which the
    reward says a digit or nothing to be the answer."""
    (found,) = scores.benchmarks
    responses, num_samples = [response for of_prompt in samples for response in of_prompt], len(samples[0])
    num_right = [sum(response.reward == 1 for response in of_prompt) for of_prompt in samples]
    assert (found.num_prompts, found.samples_per_prompt) == (len(samples), num_samples)
    # prompts differ: neither none nor all of the samples are right, nor as many of every prompt
    assert 0 < sum(num_right) < len(responses)
    assert len(set(num_right)) > 1
    assert found.standard_error == pytest.approx(stdev(num_right) / num_samples / math.sqrt(len(num_right)))
    assert sorted(found.pass_at_k) == list(range(1, num_samples + 1))
    for k, estimate in found.pass_at_k.items():
        # the share of all choices of k samples that hold a right one
        choices = [list(combinations([place < right for place in range(num_samples)], k)) for right in num_right]
        expected = fmean(fmean(any(choice) for choice in of_prompt) for of_prompt in choices)
        assert estimate.value == pytest.approx(expected), k
        assert estimate.low <= estimate.value <= estimate.high
    assert found.accuracy == found.pass_at_k[1]
    assert scores.average.value == pytest.approx(found.accuracy.value)
    assert found.accuracy.low < found.accuracy.high
    assert found.majority_at_k[1].value == pytest.approx(found.accuracy.value)
    assert found.majority_at_k[num_samples].value == pytest.approx(fmean(map(_majority_share, samples)))
    assert found.mean_response_tokens == pytest.approx(fmean(response.num_tokens for response in responses))
    assert found.truncated_fraction == pytest.approx(fmean(r.finish_reason == "length" for r in responses))
    assert found.no_answer_fraction == pytest.approx(fmean(r.extracted is None for r in responses))
    assert found.ungraded_responses == 0


def _majority_share(responses: list[SampledResponse]) -> float:
    """How much of the most frequent answers of a prompt is right; right digits count as one answer."""
    answers = Counter("right" if r.reward == 1 else r.extracted for r in responses if r.extracted is not None)
    most = max(answers.values(), default=0)
    return (answers["right"] == most) / sum(count == most for count in answers.values()) if most else 0.0
