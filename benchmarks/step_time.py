"""How near a step comes to the longer of generation and training: simulated, and measured with the real collector.

Each setting is run in the order of this project (publish, then score) and in the earlier one (score, then publish).
Simulated: the planner's model of Qwen3-30B-A3B on 64 H100. Measured: collector, journal and timer as they are, with
servers and a trainer that only wait, for the simulated durations times a scale.
"""

import argparse
import asyncio
import logging
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from minpro_megatron.buffer.step_order import Event, Fetch, Publish, StepOrder
from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.launch.recipe import load_recipe
from minpro_megatron.monitor.step_report import StepReport
from minpro_megatron.planning.plan import ClusterSize, Plan, plan_run
from minpro_megatron.records import BehaviorLogProbs, CollectedGroup, IssuedGroup, PublishLease
from minpro_megatron.roles.timer import Timer
from minpro_megatron.serving.client import SamplingParameters
from tests.support.collector_rig import collecting
from tests.support.direct_feed import Direct, Written
from tests.support.rollout_fakes import FakeServers, run_config

RECIPE, GPUS = "recipes.qwen3_30b_a3b:minpro", 64
SPLITS = [(32, 32), (24, 40), (16, 48)]
MODES = [("delay", 0), ("delay", 1), ("delay", 2), ("delay", 4), ("bounded", 2)]
SETTING = {"delay": "delay_steps", "bounded": "max_staleness"}


class ScoreFirst(StepOrder):
    """The earlier order: the coming batch is scored before the publication."""

    def of_step(self, step: int) -> Iterator[Event]:
        events = list(super().of_step(step))
        publish = next(place for place, event in enumerate(events) if isinstance(event, Publish))
        if publish + 1 < len(events) and isinstance(events[publish + 1], Fetch):
            events[publish], events[publish + 1] = events[publish + 1], events[publish]
        yield from events


@contextmanager
def order(score_first: bool) -> Iterator[None]:
    """The order that the simulator and the timer follow inside."""
    chosen: Any = ScoreFirst if score_first else StepOrder
    with (
        patch("minpro_megatron.planning.simulator.StepOrder", chosen),
        patch("minpro_megatron.roles.timer.StepOrder", chosen),
    ):
        yield


def simulated(trainer_gpus: int, server_gpus: int, mode: str, steps: int) -> Plan:
    config = load_recipe(RECIPE)
    ranks = config.parallel.world_size // config.parallel.data_size
    overrides = [f"staleness.mode={mode}", f"staleness.{SETTING[mode]}={steps}"]
    overrides += [f"parallel.data={trainer_gpus // ranks}"]
    overrides += [f"server.count={server_gpus // config.server.tensor_parallel}"]
    return plan_run(with_overrides(config, overrides), ClusterSize("h100-80gb", trainer_gpus, server_gpus))


def training_s(plan: Plan) -> float:
    return plan.cost.score + plan.cost.train + plan.cost.publish


def print_simulated() -> None:
    print("| train + serve | staleness | generation | training | step: score first | publish first | longer / step |")
    print("|---|---|---|---|---|---|---|")
    for split in SPLITS:
        for mode, steps in MODES:
            with order(score_first=True):
                before = simulated(*split, mode, steps)
            now = simulated(*split, mode, steps)
            print(
                f"| {split[0]} + {split[1]} | {mode} {steps} | {now.generation_s:.0f} | {training_s(now):.0f} "
                f"| {before.step_s:.0f} | {now.step_s:.0f} | {_ratios(before, now)} |",
                flush=True,
            )


def _ratios(before: Plan, now: Plan) -> str:
    if now.config.staleness.mode == "bounded":  # the servers never wait for a batch to end
        return f"{training_s(now) / now.step_s:.1%} (training)"
    longer = max(now.generation_s, training_s(now))
    return f"{longer / before.step_s:.1%}, {longer / now.step_s:.1%}"


class WaitingServers(FakeServers):
    """Every group takes its time, and one of each batch the whole of a generation."""

    def __init__(self, generation_s: float, exact: bool, num_prompts: int) -> None:
        super().__init__(exact=exact)
        self._generation_s, self._num_prompts = generation_s, num_prompts

    async def collect(self, issued: IssuedGroup, sampling: SamplingParameters) -> CollectedGroup:
        self.in_flight += 1
        share = 1.0 if issued.group_id % self._num_prompts == 0 else random.Random(issued.group_id).uniform(0.1, 0.9)
        await asyncio.sleep(share * self._generation_s)
        self.in_flight -= 1
        return await super().collect(issued, sampling)


class SlowScores(Direct):
    """The collector, whose trainer takes `score_s` to score a batch."""

    score_s = 0.0

    def scored(self, scores: BehaviorLogProbs) -> None:
        time.sleep(self.score_s)
        super().scored(scores)


def measured_step_s(plan: Plan, scale: float, num_steps: int) -> float:
    """Seconds of a step in the middle of a run of the real collector and timer, in the plan's time."""
    settings = plan.config.staleness
    with tempfile.TemporaryDirectory() as folder:
        bound = settings.max_staleness if settings.mode == "bounded" else 0
        config = run_config(Path(folder), steps=num_steps, delay=settings.delay_steps, max_staleness=bound)
        config = with_overrides(config, [f"debug.timer_step_s={scale * plan.cost.train}"])
        written = Written(config.run_dir)
        asyncio.run(_run(config, plan, scale, written))
    first = max(settings.delay_steps, settings.max_staleness) + 1
    ends = [written.steps[step]["time/step_s"] for step in range(first, num_steps - first)]
    return sum(ends) / len(ends) / scale


async def _run(config: RunConfig, plan: Plan, scale: float, written: Written) -> None:
    def announce(lease: PublishLease) -> list[int]:
        time.sleep(scale * plan.cost.publish)
        return [server.index for server in lease.servers]

    exact = config.staleness.mode == "delay"
    servers = WaitingServers(scale * plan.generation_s, exact, config.batch.num_prompts)
    async with collecting(config, servers) as collector:
        source = SlowScores(collector, asyncio.get_running_loop())
        source.score_s = scale * plan.cost.score
        timer = Timer(config, source, StepReport(written, lambda ids: "", 0), announce)  # type: ignore[arg-type]
        await asyncio.to_thread(timer.run)


def print_measured(modes: Sequence[tuple[str, int]], scale: float, num_steps: int) -> None:
    print("\n| staleness | generation | training | step: score first | publish first | longer / step |")
    print("|---|---|---|---|---|---|")
    for mode, steps in modes:
        plan = simulated(*SPLITS[1], mode, steps)
        with order(score_first=True):
            before = measured_step_s(plan, scale, num_steps)
        now = measured_step_s(plan, scale, num_steps)
        longer = max(plan.generation_s, training_s(plan))
        ratios = f"{longer / before:.1%}, {longer / now:.1%}" if mode == "delay" else f"{training_s(plan) / now:.1%}"
        print(
            f"| {mode} {steps} | {plan.generation_s:.0f} | {training_s(plan):.0f} | {before:.0f} | {now:.0f} "
            f"| {ratios} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=0.001, help="measured seconds of a simulated one")
    parser.add_argument("--steps", type=int, default=16)
    arguments = parser.parse_args()
    logging.disable()
    print_simulated()
    print_measured(MODES, arguments.scale, arguments.steps)


if __name__ == "__main__":
    main()
