"""Trainer and servers that share their memory in turns: the run is the one without turns, bit for bit."""

from pathlib import Path

import pytest

from tests.e2e.conftest import TinyModel
from tests.e2e.crash_cases import Case, in_turns
from tests.e2e.crash_checks import model, undisturbed
from tests.e2e.crashes import CrashRun, Results, differing

__all__ = ["model", "undisturbed"]  # fixtures

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(1200)]

IN_TURNS = ("server.placement=shared",)


@pytest.mark.parametrize("delay", [0, 2])
def test_a_run_in_turns_equals_the_one_whose_servers_have_memory_of_their_own(
    model: TinyModel, tmp_path: Path, delay: int
) -> None:
    """Tokens, log-probs, versions, scores, evaluations, metrics and weights. The reference engine really frees its
    weights: they are NaN until they are sent again."""
    settings = (f"staleness.delay_steps={delay}",)
    found = []
    for name, placement in (("apart", ()), ("turns", IN_TURNS)):
        run = CrashRun(model, tmp_path, name, *settings, *placement)
        run.finish()
        found.append(Results.read(run.run_dir))
    assert differing(*found) == []
    logs = [path.read_text() for path in sorted((tmp_path / "turns" / "logs").glob("server-*.log"))]
    assert not any("the server ends" in log for log in logs)
    assert sum(log.count("weights are released") for log in logs) >= 6 * len(logs)


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
