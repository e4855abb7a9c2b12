"""`minpro check --rehearse` and `minpro submit --rehearse` refuse what a rehearsed rank speaks against."""

from collections.abc import Callable

import pytest

from minpro_megatron.cluster import submit
from minpro_megatron.commands import check
from minpro_megatron.launch.preflight import run_checks
from minpro_megatron.rehearsal import verdict
from minpro_megatron.rehearsal.record import Phase, RankRehearsal
from tests.support.documents import ROOT
from tests.support.rehearsed_ranks import rehearsed_rank

RECIPE = "recipes.qwen3_8b:minpro_one_machine"
TOO_LARGE = rehearsed_rank(phases=[Phase("update", peak={"cuda": 90 * 10**9})])


@pytest.fixture(autouse=True)
def without_model_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_checks, "problems", lambda config: [])
    monkeypatch.setattr(run_checks, "warnings", lambda config: [])


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Callable[[RankRehearsal], None]:
    def set_found(rank: RankRehearsal) -> None:
        monkeypatch.setattr(verdict, "rehearse_kinds", lambda what, overrides: iter([rank]))

    return set_found


def run_check(*arguments: str) -> int:
    return check.main([RECIPE, *arguments])


def run_submit(*arguments: str) -> int:
    profile = str(ROOT / "cluster" / "profiles" / "this_machine.toml")
    size = ["--set", "gpu=h100-80gb", "--set", "topology.gpus_per_node=8"]
    return submit.main([RECIPE, "--profile", profile, *size, "--dry-run", "--force", *arguments])


@pytest.mark.parametrize("run", [run_check, run_submit])
def test_a_rank_that_does_not_fit_ends_the_command(
    run: Callable[..., int], found: Callable[[RankRehearsal], None], capsys: pytest.CaptureFixture[str]
) -> None:
    found(TOO_LARGE)
    assert run("--rehearse") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: rehearsal of rank 0 (data 0/2): 97.7 GB in the phase 'update'")
    assert "of h100-80gb: take more GPUs for the trainer" in error
    found(rehearsed_rank())
    assert run("--rehearse") == 0
    assert "rank 0 (data 0/2): 55.7 GB in the phase" in capsys.readouterr().out


@pytest.mark.parametrize("run", [run_check, run_submit])
def test_without_the_option_nothing_is_rehearsed(
    run: Callable[..., int], found: Callable[[RankRehearsal], None], capsys: pytest.CaptureFixture[str]
) -> None:
    found(TOO_LARGE)
    assert run() == 0
    assert "GB in the phase" not in capsys.readouterr().out


def test_the_machines_own_problems_do_not_keep_a_check_from_rehearsing(
    found: Callable[[RankRehearsal], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_checks, "problems", lambda config: ["no GPU here"])
    found(TOO_LARGE)
    assert run_check("--rehearse") == 2
    output, error = capsys.readouterr()
    assert "the problems found so far, 1, are listed after the rehearsal" in output
    assert "rank 0 (data 0/2): 97.7 GB in the phase 'update'" in output
    own, rehearsed = error.splitlines()
    assert own.endswith("no GPU here")
    assert "rehearsal of rank 0 (data 0/2): 97.7 GB" in rehearsed
    found(rehearsed_rank())
    assert run_check("--rehearse") == 2  # still no GPU


def test_a_larger_gpu_fits_it(found: Callable[[RankRehearsal], None]) -> None:
    found(TOO_LARGE)
    assert run_check("--rehearse", "--gpu", "h200-141gb") == 0


def test_a_recipe_for_the_cpu_cannot_be_rehearsed(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(["recipes.demo:tiny_moe", "--rehearse"]) == 2
    assert "device = cpu: a rehearsal is of ranks on GPUs" in capsys.readouterr().err
