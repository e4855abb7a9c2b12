"""Host memory of trainer and servers in each turn of a whole run, beside what the planner says.

On a CPU the device's memory is host memory too, and the reference engine really frees its weights. Therefore every
process is smaller in the other side's turn, by what it would free on a GPU.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
import pytest

from minpro_megatron.config.run import RunConfig
from minpro_megatron.models.architecture import read_architecture
from minpro_megatron.planning.memory import host_memory, shared_bucket_bytes, state_bytes
from minpro_megatron.planning.parameters import model_parameters
from minpro_megatron.serving.turn_files import read_turn
from tests.e2e.crashes import CrashRun, make_model, processes_of

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(1200)]

# The servers' and the trainer's turn of version 0 are left out: memory is touched for the first time in them.
FIRST_TURN = 3
MB = 1e6


@dataclass(frozen=True)
class Sample:
    """Resident bytes at one moment: of each rank and of the server, without memory that is shared, and what is in the
    buckets."""

    turn: int
    is_servers: bool
    ranks: tuple[float, ...]
    server: float
    buckets: float


def _own_bytes(process: psutil.Process) -> float:
    """Resident memory but for files and shared memory."""
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    return sum(1024.0 * int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


def _shared_bytes(process: psutil.Process) -> float:
    status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in status if line.startswith("RssShmem:"))


def _samples(run_dir: Path, mark: str) -> Iterator[Sample]:
    """One after the other, until the launch has ended."""
    ranks: list[psutil.Process] = []
    servers: list[psutil.Process] = []
    while True:
        if len(ranks) < 2 or not servers:
            for one in processes_of(mark):
                words = " ".join(one.cmdline())
                if "RANK" in one.environ() and " train " in f"{words} " and one not in ranks:
                    ranks.append(one)
                if "minpro_megatron.reference_engine" in words and one not in servers:
                    servers.append(one)
            ranks.sort(key=lambda one: int(one.environ()["RANK"]))
            time.sleep(0.2)
            continue
        before = read_turn(run_dir, 0)
        if before.is_last:  # the weights are exported
            return
        memory = [_own_bytes(one) for one in (*ranks, servers[0])]
        buckets = _shared_bytes(ranks[0])
        if read_turn(run_dir, 0) == before:
            yield Sample(before.number, before.released is None, tuple(memory[:-1]), memory[-1], buckets)
        time.sleep(0.05)


def test_each_side_frees_what_the_planner_says_in_the_turn_of_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # by default the C library keeps freed blocks of up to 32 MB for the process
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    (tmp_path / "model").mkdir()
    model = make_model(tmp_path / "model", hidden_size=768, layers=4, warm_start_steps=0)
    settings = ["server.placement=shared", "publish.transport=shared_memory", "publish.bucket_bytes=16000000"]
    settings += ["loss.kl.enabled=false", "reward.function=tests.e2e.digits_reward:grade", "server.count=1"]
    settings += ["checkpoint.every_steps=0", "checkpoint.at_end=false"]
    run, samples = CrashRun(model, tmp_path, "turns", *settings), list[Sample]()

    def watch(launcher: psutil.Process, mark: str) -> None:
        try:
            for sample in _samples(run.run_dir, mark):
                samples.append(sample)
        except (OSError, psutil.Error):
            pass  # a process has ended, and so does the run

    launched = run.launch(timeout_s=900, meanwhile=watch)
    assert launched.status == 0, f"{launched.output}\n{run.logs()}"

    seen = [one for one in samples if one.turn >= FIRST_TURN]
    trains, serves = ([one for one in seen if one.is_servers is of_servers] for of_servers in (False, True))
    assert len({one.turn for one in trains}) > 2
    assert len({one.turn for one in serves}) > 2
    config = RunConfig.from_json((run.run_dir / "run.json").read_text())
    architecture = read_architecture(config.model.hf_path)
    weights, gradients, optimizer, _ = state_bytes(config, architecture, 0)
    # a rank is largest in an update; a server is smallest before it gets its weights back
    of_rank = [[[one.ranks[rank] for one in turns] for turns in (trains, serves)] for rank in range(2)]
    largest = [max(training) - median(serving) for training, serving in of_rank]
    usual = [median(training) - median(serving) for training, serving in of_rank]
    released = median(one.server for one in serves) - min(one.server for one in trains)
    buckets = max(one.buckets for one in seen)
    of_model, planned = 4 * model_parameters(architecture), host_memory(config, architecture, 2, 0.0)
    print(
        f"\nranks free {usual[0] / MB:.0f} and {usual[1] / MB:.0f} MB (median), {largest[0] / MB:.0f} and "
        f"{largest[1] / MB:.0f} MB (from the largest); planned: weights {weights / MB:.0f}, gradients "
        f"{gradients / MB:.0f}, optimizer {optimizer / MB:.0f} MB, parked {planned.parked / 2 / MB:.0f} MB on a rank\n"
        f"the server frees {released / MB:.0f} MB; planned: {of_model / MB:.0f} MB\n"
        f"buckets {buckets / MB:.1f} MB; planned: {planned.buckets / MB:.1f} MB"
    )
    assert planned.parked == 2 * (weights + optimizer)
    states = weights + gradients + optimizer
    # An update also has activations and AdamW's temporary tensors; a part of the turn goes by without the states, while
    # the servers get weights. What the host holds of the states stays there in both turns.
    assert all(states <= 1.05 * of_one for of_one in largest)
    assert all(of_one <= 1.1 * states for of_one in usual)
    assert 0.95 * of_model <= released <= 1.25 * of_model
    assert shared_bucket_bytes(config, architecture) == planned.buckets
    assert 0.9 * planned.buckets <= buckets <= planned.buckets + 2 * 2**20
