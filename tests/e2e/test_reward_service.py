"""Runs whose rewards come from a service over HTTP: with faults, with kills during grading, and with it gone."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.e2e.conftest import SMALL_RUN, Launcher, TinyModel
from tests.e2e.crash_checks import model, undisturbed
from tests.e2e.crashes import CrashPoint, CrashRun, Results, differing
from tests.support.reward_service import RewardService

__all__ = ["model", "undisturbed"]  # fixtures

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(900)]

# Every tenth request fails, in these ways by turns.
FAILING = ("late", "dropped", "internal_error", "not_a_number", "garbage", "too_few", "half", "infinite", "texts")
COUNTED = "reward/attempts_failed"
TIMER = ("debug.trainer=timer", "debug.timer_step_s=0")


def graded_by(service: RewardService) -> list[str]:
    return ["reward.function=http", f'reward.urls=["{service.url}"]', "reward.attempt_timeout_s=1.5"]


def without_the_count(results: Results) -> tuple[Results, float]:
    """The results but for the number of failed attempts, and the largest one."""
    counts = [metrics.get(COUNTED, 0.0) for _, _, metrics in results.metrics]
    kept = [
        (step, is_step, {name: value for name, value in metrics.items() if name != COUNTED})
        for step, is_step, metrics in results.metrics
    ]
    return replace(results, metrics=kept), max(counts)


def test_a_run_with_ten_percent_of_faults_equals_the_run_without_a_service(
    model: TinyModel, undisturbed: Results, tmp_path: Path
) -> None:
    """Tokens, rewards, scores, metrics and weights, bit by bit."""
    with RewardService(share=0.1, faults=FAILING).running() as service:
        run = CrashRun(model, tmp_path, "faults", *graded_by(service))
        run.finish()
    found, num_failed = without_the_count(Results.read(run.run_dir))
    assert differing(found, without_the_count(undisturbed)[0]) == []
    assert len(service.failed) >= 3, service.failed
    assert service.failed.total() == len(service.received) // 10
    assert num_failed > 0


def test_a_run_that_is_killed_while_groups_are_graded_equals_it_too(
    model: TinyModel, undisturbed: Results, tmp_path: Path
) -> None:
    asked = CrashPoint("collect", "minpro_megatron.rewards.services:RewardServices.judge_at", call=25)
    answered = CrashPoint("collect", "minpro_megatron.rewards.services:RewardServices.judge_at", call=9, moment="after")
    with RewardService(share=0.1, faults=FAILING).running() as service:
        run = CrashRun(model, tmp_path, "killed", *graded_by(service))
        for point in (asked, answered):
            launched = run.launch(point)
            assert (launched.status, launched.reached) == (1, True), f"{launched.output}\n{run.logs()}"
            assert "error: the role collect was ended by signal SIGKILL" in launched.output
        run.finish()
    assert run.num_launches == 3
    assert differing(without_the_count(Results.read(run.run_dir))[0], without_the_count(undisturbed)[0]) == []


def test_a_service_that_never_answers_ends_the_run_with_its_address_and_its_error(launches: Launcher) -> None:
    with RewardService().running() as service:
        settings = (*SMALL_RUN, *TIMER, "num_global_steps=4", "reward.deadline_s=2", *graded_by(service))
        run = launches("away", *settings)
        run.wait_for("journal.sqlite", 120)  # it was there when the run was checked
        service.share, service.faults = 1.0, ["internal_error"]
        status, output = run.wait(200)
    assert status == 1, output
    assert "4 groups in a row could not be graded" in output
    assert f"{service.url}: status 500: 'the judge is out of memory' (attempt " in output
    assert "or start its service again (reward.urls), and launch the same command again" in output
