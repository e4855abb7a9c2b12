"""Trainer and servers that share their memory in turns: the run is the one without turns, bit for bit."""

from pathlib import Path

import pytest

from minpro_megatron.monitor.history import read_history
from tests.e2e.conftest import TinyModel
from tests.e2e.crash_cases import Case, in_turns
from tests.e2e.crash_checks import model, undisturbed
from tests.e2e.crashes import STEPS, CrashRun, Results, differing

__all__ = ["model", "undisturbed"]  # fixtures

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(1200)]

IN_TURNS = ("server.placement=shared",)


@pytest.mark.parametrize("delay", [0, 2])
def test_a_run_in_turns_equals_the_one_whose_servers_have_memory_of_their_own(
    model: TinyModel, tmp_path: Path, delay: int
) -> None:
    """Tokens, log-probs, versions, scores, evaluations, metrics and weights. The reference engine really frees its
    weights: they are NaN until they are sent again."""
    # in turns there is no publication at the start, which would count for the metrics of step 0
    settings = (f"staleness.delay_steps={delay}", "publish.at_start=false")
    found = []
    for name, placement in (("apart", ()), ("turns", IN_TURNS)):
        run = CrashRun(model, tmp_path, name, *settings, *placement)
        run.finish()
        found.append(Results.read(run.run_dir))
    assert differing(*found) == []
    apart, turns = ([_of_publications(tmp_path / name, entry) for entry in range(STEPS)] for name in ("apart", "turns"))
    assert turns == apart
    logs = [path.read_text() for path in sorted((tmp_path / "turns" / "logs").glob("server-*.log"))]
    assert not any("the server ends" in log for log in logs)
    assert sum(log.count("weights are released") for log in logs) >= 6 * len(logs)


def _of_publications(run_dir: Path, step: int) -> dict[str, float]:
    """What the metrics of the step say of its publication, without times; in turns it has a line of its own."""
    [found] = [one.metrics for one in read_history(run_dir) if one.is_global_step and one.step == step]
    names = ["publish/servers", "publish/failures", "publish/canary_abs_mean", "publish/canary_abs_max"]
    return {name: found[name] for name in names}


def test_an_alarm_of_a_publication_ends_the_run_before_its_weights_are_used(model: TinyModel, tmp_path: Path) -> None:
    """The servers, which hold the new weights, release their memory again for the last checkpoint."""
    for name, placement in (("apart", ()), ("turns", IN_TURNS)):
        run = CrashRun(model, tmp_path, name, *placement, "alarms.canary_nats=1e-12", 'alarms.stop_on=["canary"]')
        launched = run.launch()
        assert launched.status == 1, f"{launched.output}\n{run.logs()}"
        assert "train: alarms.stop_on: canary at global step 0" in launched.output
        assert [entry.step for entry in read_history(run.run_dir) if entry.is_global_step] == [0]
        assert (run.run_dir / "checkpoints" / "latest").read_text().strip().endswith("1")


def test_a_run_in_turns_with_sglang_publishes_every_version_through_shared_memory(
    model: TinyModel, tmp_path: Path
) -> None:
    """On a CPU SGLang frees nothing, but accepts the whole protocol, every step of it while the server is idle."""
    settings = ("server.engine=sglang", "publish.transport=shared_memory", "num_global_steps=4")
    run = CrashRun(model, tmp_path, "sglang", *IN_TURNS, *settings)
    run.finish()
    steps = [entry.metrics for entry in read_history(run.run_dir) if entry.is_global_step]
    assert [metrics["staleness/max"] for metrics in steps] == [0, 1, 2, 2]
    for metrics in steps:
        assert (metrics["publish/servers"], metrics["publish/failures"]) == (1, 0)
        assert metrics["publish/canary_abs_max"] < 1e-4
        assert metrics["fleet/restarts"] == 0
    log = (run.run_dir / "logs" / "server-0.log").read_text(errors="replace")
    assert log.count("Cache flushed successfully") >= 8
    assert "only when server is idle" not in log


@pytest.mark.parametrize("case", in_turns(), ids=lambda case: case.name)
def test_a_run_in_turns_survives_a_crash_in_every_transition(
    model: TinyModel, undisturbed: Results, tmp_path: Path, case: Case
) -> None:
    run = CrashRun(model, tmp_path, "crashed", *case.overrides)
    for point in case.points:
        launched = run.launch(point)
        assert (launched.status, launched.reached) == (case.status, True), f"{launched.output}\n{run.logs()}"
    if case.status:
        run.finish()
    assert differing(Results.read(run.run_dir), undisturbed) == []
