"""Steps of a run simulated as the planner does, with servers of a simple speed."""

from dataclasses import dataclass
from typing import Any

from minpro_megatron.planning.simulated_server import Lengths
from minpro_megatron.planning.simulator import Phases, Simulation, Timeline
from tests.support.planned_runs import run_to_plan


@dataclass(frozen=True)
class Steady:
    """A token takes a second, whatever runs beside it."""

    num_servers: int = 1
    max_running: int = 1000
    kv_tokens: int = 1_000_000
    prefill: float = 0.0  # s a token

    def iteration_s(self, running: int, context_tokens: float) -> float:
        return 1.0

    def prefill_s(self, tokens: float) -> float:
        return tokens * self.prefill


@dataclass(frozen=True)
class SlowedByContext(Steady):
    """A token takes as many seconds as there are tokens in the cache, prompts included."""

    def iteration_s(self, running: int, context_tokens: float) -> float:
        return context_tokens


PHASES = Phases(score=1, train=4, publish=0.5, pause=0.5)


def simulate(
    staleness: dict[str, Any],
    phases: Phases = PHASES,
    server: Any = None,
    lengths: Any = None,
    prompts: int = 4,
    steps: int = 12,
    evaluations: dict[int, list[Lengths]] | None = None,
    responses: int = 2,
    max_running_requests: int = 0,
    in_turns: bool = False,
    **settings: Any,
) -> Timeline:
    """Groups of two responses of 10 tokens, four groups a step; `max_running_requests`: another limit than the
    server's own; `in_turns`: trainer and servers share their GPUs."""
    server = server or Steady()
    config = run_to_plan(
        server={"max_running_requests": max_running_requests or server.max_running},
        batch={"num_prompts": prompts, "mini_batch_prompts": prompts, "responses_per_prompt": responses},
        staleness=staleness,
        checkpoint={"every_steps": 0},
        parallel={"tensor": 1, "context": 1, "expert": 1, "data": 1},
        **settings,
    )
    if in_turns:
        config = config.model_copy(update={"server": config.server.model_copy(update={"placement": "shared"})})
    given = lengths or (lambda group: Lengths(0, [10, 10]))
    return Simulation(config, phases, server, given, evaluations).run(steps)
