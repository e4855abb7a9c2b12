"""A trainer of two ranks that only publishes: step by step, as a test tells it, to servers that the test starts."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.config.run import RunConfig
from minpro_megatron.parallel.mesh import Mesh
from minpro_megatron.records import PublishLease, ServerAddress
from tests.mesh.harness import run_mesh

CANARY_PROMPT = [5, 6, 7, 8]


@dataclass(frozen=True)
class Step:
    """One publication. Weights are multiplied by `factor` before it."""

    version: int
    servers: list[ServerAddress]
    factor: float = 1.01
    changed: bool = True
    requests_in_flight: bool = False
    killed: tuple[int, ...] = ()  # processes that are killed when rank 0 takes the second bucket
    rename: str = ""  # put before every tensor name
    bias: float = 0.0  # added to the trainer's log-probs of the canaries


@dataclass
class Trainer:
    """Runs steps on a mesh of two ranks, which live from the first step to `end`."""

    config: RunConfig
    hf_path: Path
    folder: Path
    deadline_s: float = 400.0
    _count: int = 0
    _thread: threading.Thread | None = None
    _failure: list[BaseException] = field(default_factory=list)

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def publish(self, step: Step, timeout_s: float = 170.0) -> Any:
        """The report, or the message of the error that all ranks raised."""
        self._count += 1
        torch.save(step, self.folder / "step.tmp")
        (self.folder / "step.tmp").rename(self.folder / f"step-{self._count}")
        return self._answer(timeout_s)

    def end(self) -> None:
        (self.folder / f"step-{self._count + 1}").write_text("")
        if self._thread:
            self._thread.join(30)

    def _run(self) -> None:
        try:
            run_mesh(_on_rank, self.config, self.hf_path, self.folder, deadline_s=self.deadline_s, tensor=2)
        except BaseException as error:
            self._failure.append(error)

    def _answer(self, timeout_s: float) -> Any:
        path, deadline = self.folder / f"report-{self._count}", time.monotonic() + timeout_s
        while not path.exists():
            if self._failure:
                raise self._failure[0]
            assert time.monotonic() < deadline, f"no report after {timeout_s:g} s"
            time.sleep(0.02)
        return torch.load(path, weights_only=False)


def _on_rank(mesh: Mesh, config: RunConfig, hf_path: Path, folder: Path) -> None:
    from minpro_megatron.actor.policy import Policy
    from minpro_megatron.publishing.gather import WeightGatherer
    from minpro_megatron.publishing.publish import Publisher
    from minpro_megatron.publishing.sender import PublishError
    from tests.mesh.steps import loaded_model

    architecture, chunks = loaded_model(mesh, str(hf_path))
    policy = Policy(config, architecture, chunks, mesh)
    gatherer = _Gatherer(WeightGatherer(chunks, architecture, mesh))

    def score_canaries(pairs: list[tuple[list[int], list[int]]]) -> list[np.ndarray]:
        return [log_probs + gatherer.step.bias for log_probs in policy.score_canaries(pairs)]

    publisher = Publisher(config, gatherer, mesh, score_canaries)  # type: ignore[arg-type]
    for number in range(1, 1000):
        step = _next_step(mesh, folder / f"step-{number}")
        if step is None:
            return
        gatherer.step = step
        with torch.no_grad():
            for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
                parameter.mul_(step.factor)
        try:
            report: Any = publisher.publish(_lease(step) if mesh.rank == 0 else None, step.changed)
            assert (report is None) == (mesh.rank != 0)
        except PublishError as error:
            report = str(error)
        reports = mesh.from_all_ranks(report)
        assert len({type(one) for one in reports}) == (1 if isinstance(report, str) else 2), reports
        if mesh.rank == 0:
            torch.save(report, folder / "report.tmp")
            (folder / "report.tmp").rename(folder / f"report-{number}")


def _next_step(mesh: Mesh, path: Path) -> Step | None:
    if mesh.rank == 0:
        while not path.exists():
            time.sleep(0.02)
    mesh.from_rank_0(None)
    return torch.load(path, weights_only=False) if path.stat().st_size else None


def _lease(step: Step) -> PublishLease:
    return PublishLease(
        version=step.version,
        servers=step.servers,
        evaluations=[],
        requests_in_flight=step.requests_in_flight,
        canary_prompts=[CANARY_PROMPT, CANARY_PROMPT[:2]],
    )


class _Gatherer:
    """Passes on what a WeightGatherer gives, and does what a step wants to happen meanwhile."""

    def __init__(self, gatherer: Any) -> None:
        self._gatherer = gatherer
        self.num_buckets = gatherer.num_buckets
        self.step = Step(0, [])

    def buckets(self, bucket_bytes: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
        for number, bucket in enumerate(self._gatherer.buckets(bucket_bytes)):
            if number == 1 and torch.distributed.get_rank() == 0:
                for process in self.step.killed:
                    os.kill(process, signal.SIGKILL)
            yield [(self.step.rename + name, tensor) for name, tensor in bucket]


def _sequence(prompt: list[int], response: list[int]) -> TokenSequence:
    nothing = np.zeros(len(response), np.float32)
    return TokenSequence(
        prompt_ids=np.asarray(prompt, np.int32),
        response_ids=np.asarray(response, np.int32),
        loss_mask=nothing + 1,
        behavior_log_probs=nothing,
        rollout_log_probs=nothing,
        advantage=0.0,
        first_slot=0,
    )


def lengthen_context(folder: Path, num_tokens: int) -> None:
    """Lets the model of this folder continue longer texts."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": num_tokens}))
