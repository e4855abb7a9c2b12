"""The planner's simulation of who waits for whom, against whole runs on this machine with their own durations."""

import pytest

from benchmarks.plan_run_idle import compare
from tests.e2e.conftest import Launcher

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(900)]

MAX_ERROR = 0.15  # of the time
RUN = (
    "num_global_steps=14",
    "batch.num_prompts=16",
    "batch.mini_batch_prompts=8",
    "sampling.max_response_tokens=32",
    "evaluation.num_prompts=4",
    "evaluation.samples_per_prompt=1",
    "checkpoint.every_steps=0",
)


@pytest.mark.parametrize(
    "staleness",
    [
        ["staleness.delay_steps=0"],
        ["staleness.delay_steps=2"],
        ["staleness.mode=bounded", "staleness.max_staleness=2"],
    ],
    ids=lambda settings: settings[-1].rpartition(".")[2],
)
def test_simulated_idle_shares_are_those_of_a_run(launches: Launcher, staleness: list[str]) -> None:
    launch = launches(f"idle-{len(staleness)}-{staleness[-1][-1]}", *RUN, *staleness)
    status, output = launch.wait(840)
    assert status == 0, output
    measured, simulated = compare(launch.run_dir)
    print(f"measured {measured}, simulated {simulated}")
    assert simulated.trainer_wait == pytest.approx(measured.trainer_wait, abs=MAX_ERROR)
    assert simulated.server_idle == pytest.approx(measured.server_idle, abs=MAX_ERROR)
