"""What the tests of collector, journal and feed share: small settings, prompts, and servers that are none."""

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from minpro_megatron.config.run import RunConfig
from minpro_megatron.evaluation.in_run import Evaluations
from minpro_megatron.prompts.prompts import PromptStream, TokenizedPrompt
from minpro_megatron.records import (
    NOT_GRADED,
    Batch,
    BehaviorLogProbs,
    CollectedGroup,
    IssuedGroup,
    Prompt,
    Response,
    ServerAddress,
    TrainedStep,
)
from minpro_megatron.serving.client import SampledSequence, SamplingParameters

NUM_PROMPTS = 3
RESPONSES = 2


def run_config(
    runs_dir: Path,
    *,
    steps: int = 5,
    delay: int = 2,
    evaluate_every: int = 0,
    max_staleness: int = 0,
    dynamic_sampling: bool = False,
    over_sampling: float = 1.0,
    keep_steps: int = 50,
    placement: str = "disaggregated",
    at_start: bool = False,
) -> RunConfig:
    """Delay mode, or bounded mode where `max_staleness` is given. In a folder that exists the run folder is made, as a
    launcher makes it. `at_start`: servers sample once they have received version 0."""
    bounded = {"mode": "bounded", "max_staleness": max_staleness} if max_staleness else {}
    config = RunConfig.model_validate(
        {
            "name": "test",
            "runs_dir": str(runs_dir),
            "num_global_steps": steps,
            "device": "cpu",
            "model": {"hf_path": "unused", "megatron_path": "unused", "dtype": "float32"},
            "data": {"train_file": "unused", "heldout_file": "unused"},
            "batch": {
                "num_prompts": NUM_PROMPTS,
                "responses_per_prompt": RESPONSES,
                "mini_batch_prompts": NUM_PROMPTS,
                "max_tokens_per_row": 64,
                "dynamic_sampling": dynamic_sampling,
                "over_sampling": over_sampling,
            },
            "sampling": {"max_prompt_tokens": 8, "max_response_tokens": 6},
            "staleness": {"delay_steps": delay, **bounded},
            "server": {"device": "cpu", "dtype": "float32"},
            "publish": {"at_start": at_start},
            "collector": {"journal_keep_steps": keep_steps},
            "evaluation": {"num_prompts": 2, "samples_per_prompt": 2, "every_steps": evaluate_every},
        }
    )
    config = config.model_copy(update={"server": config.server.model_copy(update={"placement": placement})})
    if runs_dir.is_dir():
        config.run_dir.mkdir(exist_ok=True)
    return config


def tokenized_prompts(count: int) -> list[TokenizedPrompt]:
    return [
        TokenizedPrompt(
            Prompt(id=f"p{number}", source="test", text=f"{number}=", answer=str(number)),
            np.asarray([3 + number % 10, 20], dtype=np.int32),
        )
        for number in range(count)
    ]


def issued_groups(group_ids: Sequence[int], batch_index: int = 0, version: int = 0) -> list[IssuedGroup]:
    stream = PromptStream(tokenized_prompts(9), run_config(Path("unused")))
    return [stream.group(group_id, batch_index, version) for group_id in group_ids]


def sequence(version: int, seed: int, length: int = 3) -> SampledSequence:
    return SampledSequence(
        token_ids=np.asarray([(seed + place) % 20 + 3 for place in range(length)], dtype=np.int32),
        log_probs=np.linspace(-1, -0.1, length, dtype=np.float32),
        policy_versions=np.full(length, version, dtype=np.int32),
        finish_reason="length",
    )


def collected(
    issued: IssuedGroup,
    versions: Sequence[int] | None = None,
    routes: Sequence[np.ndarray | None] = (),
    supports: Sequence[np.ndarray] = (),
) -> CollectedGroup:
    """The group as sampled from its seeds; the tokens of every response have `versions` one after the other, so that
    these are the responses' lengths; without them, lengths vary and the version is the one it was issued for."""
    responses = []
    for place, seed in enumerate(issued.sampling_seeds):
        sampled = sequence(issued.policy_version, seed, length=len(versions) if versions else 1 + seed % 4)
        responses.append(
            Response(
                token_ids=sampled.token_ids,
                rollout_log_probs=sampled.log_probs,
                policy_versions=np.asarray(versions, dtype=np.int32) if versions else sampled.policy_versions,
                finish_reason="length",
                reward=float(seed % 2),
                routed_experts=routes[place] if routes else None,
                supports=supports[place] if supports else None,
            )
        )
    return CollectedGroup(issued=issued, responses=responses)


def scores_of(batch: Batch, policy_version: int | None = None) -> BehaviorLogProbs:
    version = batch.groups[0].issued.policy_version if policy_version is None else policy_version
    return BehaviorLogProbs(index=batch.index, policy_version=version, log_probs=log_probs_of(batch.groups))


def log_probs_of(groups: Sequence[CollectedGroup]) -> list[list[np.ndarray]]:
    """Recognisable ones: the rollout's, and a little less."""
    return [[response.rollout_log_probs - np.float32(0.25) for response in group.responses] for group in groups]


def with_log_probs(groups: Sequence[CollectedGroup]) -> list[tuple[CollectedGroup, list[np.ndarray]]]:
    """What the journal takes as scores."""
    return list(zip(groups, log_probs_of(groups), strict=True))


def trained(step: int, version: int | None = None) -> TrainedStep:
    return TrainedStep(step=step, policy_version=step if version is None else version)


class FakeServers:
    """Stands for the fleet and what it samples: the servers hold versions, restart with the initial weights, and
    answer after a few turns of the event loop that depend on the group's seeds.

    In delay mode (`exact`) it catches a version that replaces another under work. In bounded mode a response's tokens
    are half of the version at its start and half of that at its end, and the groups `spanning` take
    until the next version.
    """

    def __init__(self, count: int = 1, *, exact: bool = True, longest: int = 5, spanning: Sequence[int] = ()) -> None:
        self.version = 0
        self.in_flight = 0
        self.issued: list[IssuedGroup] = []
        self.restarts_requested: list[tuple[int, int]] = []
        self.kept: list[list[int] | None] = []  # by turn: the servers that keep their process; None: it is theirs
        self.fail_with: Exception | None = None
        self._exact = exact
        self._longest = longest
        self._spanning = spanning
        self._count = count
        self._starts = dict.fromkeys(range(count), 0)
        self._initial: int | None = 0  # what a server holds when it has started, until a version is published
        self._held: dict[int, int | None] = dict.fromkeys(range(count), 0)

    def members(self) -> list[ServerAddress]:
        return [self.address(index) for index in self._starts]

    def missing(self) -> set[int]:
        return set(range(self._count)) - set(self._starts)

    def outdated(self) -> list[ServerAddress]:
        return [self.address(index) for index, held in self._held.items() if held != self.version]

    def lend(self, servers: Sequence[ServerAddress]) -> None:
        pass

    def request_restart(self, servers: Sequence[ServerAddress], reason: str) -> None:
        self.restarts_requested += [(server.index, server.start) for server in servers]

    def set_version(self, version: int, held_by: Sequence[int]) -> None:
        if version != self.version and self._exact:
            assert self.in_flight == 0, "published while requests are in flight"
        self.version, self._initial = version, None
        self._held = {index: version if index in held_by else None for index in self._starts}

    async def keep_only(self, released: Sequence[ServerAddress]) -> None:
        assert self.in_flight == 0, "released while requests are in flight"
        self.kept.append([server.index for server in released])

    async def end_all(self) -> None:
        await self.keep_only([])

    async def let_start(self) -> None:
        self.kept.append(None)

    def metrics(self) -> dict[str, float]:
        return {"fleet/members": float(len(self._starts))}

    def address(self, index: int) -> ServerAddress:
        start = self._starts[index]
        return ServerAddress(index=index, url=f"http://127.0.0.1:{index + 1}", tensor_parallel=1, start=start)

    def restart(self, index: int) -> None:
        self._starts[index] += 1
        self._held[index] = self._initial

    def withdraw(self, index: int) -> None:
        del self._starts[index], self._held[index]

    def rejoin(self, index: int) -> None:
        self._starts[index], self._held[index] = 1, self._initial

    async def collect(self, issued: IssuedGroup, sampling: SamplingParameters) -> CollectedGroup:
        self.issued.append(issued)
        routes = [np.full((4, 1, 1), issued.group_id, np.uint8)] * RESPONSES if sampling.with_routes else ()
        supports = [np.full(6, issued.group_id, np.int32)] * RESPONSES if sampling.with_supports else ()
        while self.version not in self._held.values():
            await asyncio.sleep(0.001)
        first_version = self.version
        self.in_flight += 1
        try:
            for _ in range(issued.sampling_seeds[0] % self._longest):
                await asyncio.sleep(0)
            while issued.group_id in self._spanning and self.version == first_version:
                await asyncio.sleep(0.001)
            if self.fail_with is not None:
                raise self.fail_with
            if self._exact:
                assert issued.policy_version == self.version, "sampled with another version than it was issued for"
                return collected(issued, routes=routes, supports=supports)
            return collected(issued, versions=[first_version, self.version], routes=routes, supports=supports)
        finally:
            self.in_flight -= 1


def no_evaluations() -> Evaluations:
    async def collect(issued: IssuedGroup, sampling: SamplingParameters) -> CollectedGroup:
        raise AssertionError("nothing is to be evaluated")

    return Evaluations(run_config(Path("unused")), [], collect)


class FailingGrades(FakeServers):
    """Of the training groups whose number `fails` accepts one response has no reward; of evaluations the responses
    `not_graded`, counted over all of them."""

    def __init__(
        self, fails: Callable[[int], bool] = lambda group_id: False, not_graded: Sequence[int] = (), **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self._fails = fails
        self._not_graded = not_graded

    async def collect(self, issued: IssuedGroup, sampling: SamplingParameters) -> CollectedGroup:
        group = await super().collect(issued, sampling)
        size = len(group.responses)
        if not issued.is_evaluation:
            places = [size - 1] if self._fails(issued.group_id) else []
        else:
            places = [place for place in range(size) if issued.group_id * size + place in self._not_graded]
        responses = [
            msgspec.structs.replace(response, reward=NOT_GRADED) if place in places else response
            for place, response in enumerate(group.responses)
        ]
        problem = "grader failed: KeyError: 'x'" if places else ""
        return CollectedGroup(issued=issued, responses=responses, grading_problem=problem)


def write_rows(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
