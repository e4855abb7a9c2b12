"""A machine that cannot lend its GPUs in turns is refused before the start, in one line for each reason."""

import re
from pathlib import Path

import pytest

from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.launch.preflight import shared_gpu_check
from minpro_megatron.launch.preflight.shared_gpu_check import machine_memory_bytes, shared_gpu_problems
from tests.support.hf_models import MIXTURE, make_model
from tests.support.run_examples import example_config

ENOUGH = 10**15


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setattr(shared_gpu_check, "find_spec", lambda name: name)
    make_model(tmp_path / "hf", MIXTURE)
    sections = {"server": {"device": "cuda", "placement": "shared"}, "publish": {"transport": "shared_memory"}}
    config = example_config(tmp_path, device="cuda", **sections)
    return with_overrides(config, [f"model.hf_path={tmp_path / 'hf'}"])


def test_a_machine_that_fits_has_no_problem(config: RunConfig) -> None:
    assert list(shared_gpu_problems(config, [0] * 8, 8, ENOUGH)) == []


def test_gpus_for_one_process_only_are_refused(config: RunConfig) -> None:
    [line] = shared_gpu_problems(config, [0, 3], 2, ENOUGH)
    assert re.search(r"^server.placement = shared: GPU 1 is in a compute mode .* --compute-mode=0", line)
    apart = config.model_copy(update={"server": config.server.model_copy(update={"placement": "disaggregated"})})
    assert list(shared_gpu_problems(apart, [0, 3], 2, 0)) == []


def test_sglang_needs_its_memory_saver(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_gpu_check, "find_spec", lambda name: None)
    [line] = shared_gpu_problems(config, [0], 1, ENOUGH)
    assert "torch-memory-saver, which is not installed" in line
    pinned = Path("environment/constraints_gpu.txt").read_text(encoding="utf-8")
    assert "\ntorch-memory-saver==" in pinned


def test_the_host_must_have_room_for_the_states(config: RunConfig) -> None:
    """Every process of a rank takes 4 GiB beside the states."""
    assert list(shared_gpu_problems(config, [0], 2, 9 * 2**30)) == []
    [line] = shared_gpu_problems(config, [0], 2, 8 * 2**30)
    assert re.search(
        r"^server.placement = shared: this machine has 8.6 GB of memory, .* 2 trainer ranks need 8.6 GB", line
    )
    assert list(shared_gpu_problems(config, [0], 0, 0)) == []  # a node without ranks


@pytest.mark.parametrize(
    ("lines", "files", "limit"),
    [
        ("0::/job/step\n", {"job/memory.max": "5000\n", "job/step/memory.max": "max\n"}, 5000),
        ("0::/host/path\n", {"memory.max": "6000\n"}, 6000),  # of a container, mounted as the root
        ("4:cpu,memory:/docker/1\n0::/\n", {"memory/docker/1/memory.limit_in_bytes": "7000\n"}, 7000),
        ("0::/\n", {}, None),
    ],
)
def test_the_memory_of_a_machine_is_the_smallest_limit(
    tmp_path: Path, lines: str, files: dict[str, str], limit: int | None
) -> None:
    own = tmp_path / "own"
    own.write_text(lines)
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    whole = machine_memory_bytes(tmp_path / "none", tmp_path / "absent")
    assert whole > 10**8
    assert machine_memory_bytes(tmp_path / "cgroup", own) == (limit or whole)
