"""What the tests of collector, journal and feed share: small settings, prompts, and a generator without a server."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minpro_megatron.config.run import RunConfig
from minpro_megatron.records import Batch, BehaviorLogProbs, CollectedGroup, IssuedGroup, Prompt, Response
from minpro_megatron.rollout.prompts import TokenizedPrompt
from minpro_megatron.serving.client import SampledSequence, SamplingParameters

NUM_PROMPTS = 3
RESPONSES = 2


def run_config(runs_dir: Path, *, steps: int = 5, delay: int = 2, evaluate_every: int = 0) -> RunConfig:
    return RunConfig.model_validate(
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
            },
            "sampling": {"max_prompt_tokens": 8, "max_response_tokens": 6},
            "staleness": {"delay_steps": delay},
            "server": {"device": "cpu", "dtype": "float32"},
            "evaluation": {"num_prompts": 2, "samples_per_prompt": 2, "every_steps": evaluate_every},
        }
    )


def tokenized_prompts(count: int) -> list[TokenizedPrompt]:
    return [
        TokenizedPrompt(
            Prompt(id=f"p{number}", source="test", text=f"{number}=", answer=str(number)),
            np.asarray([3 + number % 10, 20], dtype=np.int32),
        )
        for number in range(count)
    ]


def sequence(version: int, seed: int, length: int = 3) -> SampledSequence:
    return SampledSequence(
        token_ids=np.asarray([(seed + place) % 20 + 3 for place in range(length)], dtype=np.int32),
        log_probs=np.linspace(-1, -0.1, length, dtype=np.float32),
        policy_versions=np.full(length, version, dtype=np.int32),
        finish_reason="length",
    )


def collected(issued: IssuedGroup) -> CollectedGroup:
    responses = []
    for seed in issued.sampling_seeds:
        sampled = sequence(issued.policy_version, seed, length=1 + seed % 4)
        responses.append(
            Response(
                token_ids=sampled.token_ids,
                rollout_log_probs=sampled.log_probs,
                policy_versions=sampled.policy_versions,
                finish_reason="length",
                reward=float(seed % 2),
            )
        )
    return CollectedGroup(issued=issued, responses=responses)


def scores_of(batch: Batch) -> BehaviorLogProbs:
    return BehaviorLogProbs(
        index=batch.index,
        policy_version=batch.groups[0].issued.policy_version,
        log_probs=[[response.rollout_log_probs for response in group.responses] for group in batch.groups],
    )


class FakeServers:
    """Stands for the servers: holds one version, notes what it is asked, and catches work that spans a publication."""

    def __init__(self) -> None:
        self.version = 0
        self.in_flight = 0
        self.issued: list[IssuedGroup] = []
        self.fail_with: Exception | None = None

    async def collect(self, issued: IssuedGroup, sampling: SamplingParameters) -> CollectedGroup:
        self.issued.append(issued)
        self.in_flight += 1
        try:
            for _ in range(issued.sampling_seeds[0] % 5):
                await asyncio.sleep(0)
            if self.fail_with is not None:
                raise self.fail_with
            assert issued.policy_version == self.version, "sampled with another version than it was issued for"
            return collected(issued)
        finally:
            self.in_flight -= 1

    def publish(self, version: int) -> None:
        assert self.in_flight == 0, "published while requests are in flight"
        self.version = version


def write_rows(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
