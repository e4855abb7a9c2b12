"""How many canaries a trainer has to score at most."""

from typing import Any

import pytest

from minpro_megatron.publishing.canary import distinct_continuations
from minpro_megatron.publishing.canary_count import Canaries, continuation_tokens, most_canaries
from minpro_megatron.serving.control import GreedyAnswer
from tests.support.planned_runs import run_to_plan


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Canaries(4 * 4, 1024, 16)),
        ({"server": {"count": 20}}, Canaries(4 * 20, 1024, 16)),
        ({"server": {"urls": ["http://one:1", "http://two:2"]}}, Canaries(4 * 2, 1024, 16)),
        ({"evaluation": {"num_prompts": 3}}, Canaries(3 * 4, 1024, 22)),
        ({"publish": {"canary_tokens": 1}}, Canaries(4 * 4, 1024, 1)),
        ({"sampling": {"max_prompt_tokens": 512, "max_response_tokens": 8}}, Canaries(4 * 4, 512, 8)),
        ({"publish": {"canary_tokens": 0}}, Canaries(0, 1024, 0)),
    ],
)
def test_the_most_canaries_of_a_run(changes: dict[str, Any], expected: Canaries) -> None:
    assert most_canaries(run_to_plan(**changes)) == expected


def test_servers_that_never_agree_make_as_many_continuations() -> None:
    config = run_to_plan()
    most = most_canaries(config)
    each = continuation_tokens(config, 4)
    answers = {
        server: [GreedyAnswer(token_ids=[server] * each, log_probs=[0.0] * each, policy_version=1)] * 4
        for server in range(4)
    }
    assert len(distinct_continuations(answers)) == most.count
    assert {len(tokens) for _, tokens in distinct_continuations(answers)} == {most.continuation_tokens}
    assert len(distinct_continuations(dict.fromkeys(range(4), answers[0]))) == 4  # as servers that agree
