"""Compares the simulator's idle shares with those of a real run, using that run's own durations.

    python -m benchmarks.plan_run_idle RUN_DIR ...

From metrics.jsonl of each run: the mean durations of scoring, updates and publications, and the rate of a response
on a server (fleet/tokens_per_s/<index>), all under the mutual load of trainer and servers. From these and the run's
settings the simulator predicts how long either side waits; the measured waits are in the same file.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from minpro_megatron.config.run import RunConfig
from minpro_megatron.planning.simulator import Phases, Simulation
from minpro_megatron.planning.workload import GroupLengths, Workload

LEFT_OUT = 3  # steps at the start, and at the end as many as the run is off-policy, when servers have nothing to do


@dataclass(frozen=True)
class MeasuredServer:
    """A server with the measured rate (planning.simulated_server.ServerModel)."""

    num_servers: int
    max_running: int
    kv_tokens: int
    token_s: float

    def iteration_s(self, running: int, context_tokens: float) -> float:
        return self.token_s

    def prefill_s(self, tokens: float) -> float:
        return 0.0


@dataclass(frozen=True)
class IdleShares:
    trainer_wait: float
    server_idle: float
    step_s: float


def compare(run_dir: Path) -> tuple[IdleShares, IdleShares]:
    """(measured, simulated) over the steps in mid-run. Raises ValueError if there are not enough of them."""
    config = RunConfig.from_json((run_dir / "run.json").read_text())
    lines = [json.loads(line)["metrics"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "time/step_s" in line]
    settings = config.staleness
    off_policy = settings.delay_steps if settings.mode == "delay" else settings.max_staleness
    middle = steps[LEFT_OUT : len(steps) - off_policy - 1]
    if len(middle) < 4:
        raise ValueError(f"{run_dir}: {len(middle)} steps in mid-run; at least 4 are needed: raise num_global_steps")

    def mean(name: str) -> float:
        found = [step[name] for step in middle if name in step]
        return sum(found) / len(found)

    total_s = sum(step["time/step_s"] for step in middle)
    measured = IdleShares(
        sum(step["time/wait_for_batch_s"] for step in middle) / total_s,
        mean("overlap/server_idle_share"),
        mean("time/step_s"),
    )
    phases = Phases(mean("time/score_s"), mean("time/train_s"), mean("time/publish_s"), mean("publish/paused_s"))
    rates = [step[name] for step in middle for name in step if name.startswith("fleet/tokens_per_s/")]
    token_s = sum(1 / rate for rate in rates) / len(rates)
    kv_tokens = config.server.max_total_tokens or sys.maxsize  # the model of such a run is too small to fill it
    # requests in a server's own queue are part of the measured rate, so all requests of a server count as running
    server = MeasuredServer(config.server.count, config.server.max_requests_under_way, kv_tokens, token_s)
    limits = config.sampling
    workload = Workload(min(8, limits.max_prompt_tokens), min(mean("response/length_mean"), limits.max_response_tokens))
    first, last = off_policy + 2, off_policy + 12
    timeline = Simulation(config, phases, server, GroupLengths(config, workload)).run(last)
    simulated = IdleShares(
        timeline.wait_share(first, last), timeline.idle_share(first, last), timeline.step_s(first, last)
    )
    return measured, simulated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", nargs="+", type=Path)
    print(
        "| run | trainer waits: measured | simulated | servers idle: measured | simulated "
        "| s a step: measured | simulated |"
    )
    print("|---|---|---|---|---|---|---|")
    for run_dir in parser.parse_args().run_dir:
        measured, simulated = compare(run_dir)
        cells = [
            f"{100 * measured.trainer_wait:.1f} % | {100 * simulated.trainer_wait:.1f} %",
            f"{100 * measured.server_idle:.1f} % | {100 * simulated.server_idle:.1f} %",
            f"{measured.step_s:.2f} | {simulated.step_s:.2f}",
        ]
        print(f"| {run_dir.name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
