"""Groups become responses with rewards: in their order, on one server each, first come, first served."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

from minpro_megatron.fleet import fleet as fleet_module
from minpro_megatron.fleet.fleet import Fleet
from minpro_megatron.fleet.generation import GroupCollector
from minpro_megatron.models.model_files import ModelFacts
from minpro_megatron.records import CollectedGroup, IssuedGroup, Prompt, ServerAddress
from minpro_megatron.rewards.graders import SampledText
from minpro_megatron.rewards.judging import Judged
from minpro_megatron.serving.client import SamplingParameters
from minpro_megatron.serving.endpoints import write_server_address
from tests.support.fake_client import FakeClient
from tests.support.rollout_fakes import RESPONSES, run_config, sequence, tokenized_prompts

SAMPLING = SamplingParameters(1.0, 4)
FACTS = ModelFacts(vocabulary_size=64, stop_token_ids=(1,), max_position_embeddings=64)


class FakeRewards:
    """The length of a text; of prompts with the answer "none" the first response cannot be graded."""

    async def judge(
        self, prompt: Prompt, responses: Sequence[SampledText], stop_at_failure: bool = False
    ) -> list[Judged]:
        judged = [Judged(float(len(response.text))) for response in responses]
        if prompt.answer == "none":
            judged[0] = Judged(None, problem="grader died")
            return judged[:1] if stop_at_failure else judged
        return judged


class FakeTokenizer:
    def response_texts(self, responses: Sequence[np.ndarray]) -> list[str]:
        return ["x" * len(token_ids) for token_ids in responses]


class SlowRewards(FakeRewards):
    """Grades nothing until `num_groups` groups are sampled and wait for their grades."""

    def __init__(self, num_groups: int) -> None:
        self._num_missing = num_groups
        self._all_wait = asyncio.Event()

    async def judge(
        self, prompt: Prompt, responses: Sequence[SampledText], stop_at_failure: bool = False
    ) -> list[Judged]:
        self._num_missing -= 1
        if not self._num_missing:
            self._all_wait.set()
        await self._all_wait.wait()
        return await super().judge(prompt, responses, stop_at_failure)


def collect(
    tmp_path: Path,
    clients: Sequence[FakeClient],
    groups: Sequence[IssuedGroup],
    max_running_requests: int = 256,
    rewards: FakeRewards | None = None,
) -> list[CollectedGroup]:
    values = run_config(tmp_path).model_dump()
    values["server"] |= {"count": len(clients), "max_running_requests": max_running_requests}
    config = type(run_config(tmp_path)).model_validate(values)

    async def main() -> list[CollectedGroup]:
        for index in range(len(clients)):
            write_server_address(config.run_dir, ServerAddress(index=index, url="http://x", tensor_parallel=1), 0)

        def make_client(address: ServerAddress) -> FakeClient:
            return clients[address.index]

        async with Fleet(config, FACTS, 0, make_client, watch_interval_s=0.005) as fleet:
            await fleet.wait_until_ready(5)
            collector = GroupCollector(fleet, rewards or FakeRewards(), FakeTokenizer())  # type: ignore[arg-type]
            return await asyncio.gather(*(collector.collect(group, SAMPLING) for group in groups))

    return asyncio.run(main())


@pytest.fixture
def groups() -> list[IssuedGroup]:
    return [
        IssuedGroup(
            group_id=number,
            batch_index=0,
            policy_version=0,
            prompt=tokenized.prompt,
            prompt_token_ids=tokenized.token_ids,
            sampling_seeds=[RESPONSES * number + response for response in range(RESPONSES)],
        )
        for number, tokenized in enumerate(tokenized_prompts(12))
    ]


def test_responses_keep_their_order_and_rewards(tmp_path: Path, groups: list[IssuedGroup]) -> None:
    routes = np.ones((4, 2, 2), np.uint8)
    (group,) = collect(tmp_path, [FakeClient("a", routes=routes)], groups[:1])
    assert group.issued is groups[0]
    expected = [sequence(0, seed).token_ids.tolist() for seed in groups[0].sampling_seeds]
    assert [response.token_ids.tolist() for response in group.responses] == expected
    assert [response.reward for response in group.responses] == [3.0] * RESPONSES
    assert all(response.routed_experts is routes for response in group.responses)
    assert group.oldest_version == 0


def test_a_given_prefix_is_graded_with_the_response(tmp_path: Path, groups: list[IssuedGroup]) -> None:
    prompt = msgspec.structs.replace(groups[0].prompt, prefix="12345")
    (group,) = collect(tmp_path, [FakeClient("a")], [msgspec.structs.replace(groups[0], prompt=prompt)])
    assert [response.reward for response in group.responses] == [5.0 + 3.0] * RESPONSES  # FakeRewards: the length
    assert all(len(response.token_ids) == 3 for response in group.responses)


@pytest.mark.parametrize(("is_evaluation", "graded"), [(False, [False, False]), (True, [False, True])])
def test_what_could_not_be_graded_has_no_reward(
    tmp_path: Path, groups: list[IssuedGroup], is_evaluation: bool, graded: list[bool]
) -> None:
    """A group for training is of no use then; in an evaluation every response counts."""
    prompt = msgspec.structs.replace(groups[0].prompt, answer="none")
    issued = msgspec.structs.replace(groups[0], prompt=prompt, is_evaluation=is_evaluation)
    (group,) = collect(tmp_path, [FakeClient("a")], [issued])
    assert [response.is_graded for response in group.responses] == graded
    assert group.grading_problem == "grader died"
    assert len(group.responses) == RESPONSES


def test_groups_spread_over_the_servers_and_each_stays_on_one(tmp_path: Path, groups: list[IssuedGroup]) -> None:
    clients = [FakeClient("a"), FakeClient("b"), FakeClient("c")]
    collect(tmp_path, clients, groups)
    assert [len(client.groups) for client in clients] == [4, 4, 4]
    asked = [seeds for client in clients for seeds in client.groups]
    assert sorted(asked) == sorted(tuple(group.sampling_seeds) for group in groups)


def test_evaluation_groups_start_after_training_groups(tmp_path: Path, groups: list[IssuedGroup]) -> None:
    evaluated = [msgspec.structs.replace(group, is_evaluation=True) for group in groups[:3]]
    client = FakeClient("a", steps=3)
    collect(tmp_path, [client], [*evaluated, *groups[3:6]], max_running_requests=2)  # one group at a time
    seeds = [tuple(group.sampling_seeds) for group in groups]
    # the first one found the server free
    assert client.groups == [seeds[0], *seeds[3:6], *seeds[1:3]]


def test_few_open_files_bound_the_groups_over_all_servers(
    tmp_path: Path, groups: list[IssuedGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, connections failed, and with them all servers, for as long as all groups were tried again at once."""
    monkeypatch.setattr(fleet_module, "max_groups_under_way", lambda config: 3)
    clients = [FakeClient(name, steps=5) for name in ("a", "b")]
    collect(tmp_path, clients, groups)
    assert sum(client.most_in_flight for client in clients) == 3
    assert sum(len(client.groups) for client in clients) == len(groups)


def test_a_group_that_is_graded_occupies_no_server(tmp_path: Path, groups: list[IssuedGroup]) -> None:
    """The server has room for two groups, and samples all of them before the first one is graded."""
    client, rewards = FakeClient("a", steps=3), SlowRewards(len(groups))
    found = collect(tmp_path, [client], groups, max_running_requests=4, rewards=rewards)
    assert client.most_in_flight == 2
    assert [response.reward for group in found for response in group.responses] == [3.0] * len(groups) * RESPONSES


def test_concurrency_is_bounded_and_groups_start_in_order(tmp_path: Path, groups: list[IssuedGroup]) -> None:
    client = FakeClient("a", steps=3)
    collect(tmp_path, [client], groups, max_running_requests=4)  # 5 requests: two groups of two
    assert client.most_in_flight == 2
    assert client.groups == [tuple(group.sampling_seeds) for group in groups]
