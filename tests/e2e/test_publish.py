"""Publishing from a trainer of two ranks to two servers, of both engines: what arrives, and what survives a death."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import torch

from minpro_megatron.config.run import RunConfig
from minpro_megatron.records import ServerAddress
from minpro_megatron.serving.control import ServerControl
from minpro_megatron.serving.server_process import ServerProcess, stop_servers
from tests.e2e.publishing import CANARY_PROMPT, Step, Trainer, lengthen_context
from tests.e2e.random_models import save_random_model
from tests.support.long_cases import long_after

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(400),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU engine's stand-ins are not for GPU machines"),
]

CONTEXT = 2048
BUCKET_BYTES = 8000  # several buckets
TEMPERATURE = 0.7  # not 1: both sides must divide by it
MAX_DIFFERENCE = 1e-4  # of a log-prob, between engine and trainer


def make_config(root: Path, folder: Path, engine: str, **publish: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "publish",
            "runs_dir": str(root / "runs"),
            "device": "cpu",
            "model": {"hf_path": str(folder), "megatron_path": "unused", "dtype": "float32"},
            "data": {"train_file": "unused", "heldout_file": "unused"},
            "parallel": {"tensor": 2},
            "sampling": {"temperature": TEMPERATURE, "max_prompt_tokens": 8, "max_response_tokens": CONTEXT - 16},
            "batch": {"max_tokens_per_row": CONTEXT},
            "server": {
                "engine": engine,
                "count": 2,
                "device": "cpu",
                "dtype": "float32",
                "max_total_tokens": 16384,
                "start_timeout_s": 170,
            },
            "publish": {"bucket_bytes": BUCKET_BYTES, "timeout_s": 60} | publish,
        }
    )


@dataclass
class Fleet:
    """Two servers, and trainers that publish to them. `version`: the last one published."""

    config: RunConfig
    folder: Path
    processes: list[ServerProcess]
    version: int = 0

    @property
    def addresses(self) -> list[ServerAddress]:
        return [process.address for process in self.processes]

    def control(self, index: int) -> ServerControl:
        return ServerControl(self.addresses[index], timeout_s=60)

    def step(self, **changes: Any) -> Step:
        self.version += 1
        return Step(**{"version": self.version, "servers": self.addresses} | changes)


@pytest.fixture(scope="module", params=["reference", pytest.param("sglang", marks=pytest.mark.long)])
def fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    root = tmp_path_factory.mktemp("publish")
    folder = root / "hf"
    save_random_model(folder, seed=0)
    lengthen_context(folder, CONTEXT)
    config = make_config(root, folder, request.param)
    processes = [ServerProcess(config, index) for index in range(2)]
    try:
        for process in processes:
            process.start()
        assert all(process.wait_until_ready(170) for process in processes)
        yield Fleet(config, folder, processes)
    finally:
        stop_servers(processes)


@pytest.fixture
def trainer(fleet: Fleet, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Trainer]:
    """Starts from the folder's weights. Parametrize indirectly with settings of `publish`."""
    config = make_config(fleet.folder.parent, fleet.folder, fleet.config.server.engine, **getattr(request, "param", {}))
    made = Trainer(config, fleet.folder, tmp_path)
    made.start()
    yield made
    made.end()


def held(fleet: Fleet) -> list[tuple[int, str]]:
    controls = [fleet.control(index) for index in range(2)]
    return [(control.policy_version(), control.weights_checksum().engine) for control in controls]


TRANSPORTS = [{"transport": transport} for transport in ("broadcast", "shared_memory")]


def test_version_0_changes_nothing(fleet: Fleet, trainer: Trainer) -> None:
    """The first test: the servers have loaded the folder, and have the same bits from the trainer."""
    loaded = held(fleet)
    assert [version for version, _ in loaded] == [0, 0]
    report = trainer.publish(Step(0, fleet.addresses, factor=1.0, changed=False))
    assert (report.held_by, report.transport) == ([0, 1], "broadcast")
    assert held(fleet) == loaded
    assert max(canary.max for canary in report.canaries.values()) < MAX_DIFFERENCE


@pytest.mark.parametrize("trainer", TRANSPORTS, indirect=True, ids=lambda settings: settings["transport"])
def test_both_servers_hold_what_the_ranks_hold(fleet: Fleet, trainer: Trainer) -> None:
    before = held(fleet)
    for number in range(2):
        report = trainer.publish(fleet.step())
        assert (report.held_by, report.failures) == ([0, 1], {})
        assert report.transport == trainer.config.publish.transport
        assert held(fleet) == [(fleet.version, report.checksum)] * 2
        assert report.checksum != before[0][1]
        assert report.num_bytes == (fleet.folder / "model.safetensors").stat().st_size - header_bytes(fleet.folder)
        assert set(report.canaries) == {0, 1}
        assert max(canary.max for canary in report.canaries.values()) < MAX_DIFFERENCE, number
        assert report.paused_s == 0.0
        assert 0 < report.transfer_s < report.total_s
        before = held(fleet)


def header_bytes(folder: Path) -> int:
    with (folder / "model.safetensors").open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


@pytest.mark.long
def test_shared_memory_gives_the_weights_that_a_broadcast_gives(fleet: Fleet, tmp_path: Path) -> None:
    """Bit by bit: the servers compute the checksums."""
    found = []
    for settings in TRANSPORTS:
        folder = tmp_path / settings["transport"]
        folder.mkdir()
        config = make_config(fleet.folder.parent, fleet.folder, fleet.config.server.engine, **settings)
        trainer = Trainer(config, fleet.folder, folder)
        trainer.start()
        trainer.publish(fleet.step(factor=1.5))  # other weights, so that the next publication has to replace them
        report = trainer.publish(fleet.step(factor=1.07))
        trainer.end()
        assert (report.held_by, report.transport) == ([0, 1], settings["transport"])
        found.append([checksum for _, checksum in held(fleet)])
    assert found[0] == found[1]


@pytest.mark.parametrize("trainer", [{"transport": "disk"}], indirect=True)
def test_through_files(fleet: Fleet, trainer: Trainer) -> None:
    for _ in range(2):
        report = trainer.publish(fleet.step())
        assert (report.held_by, report.failures, report.transport) == ([0, 1], {}, "disk")
        assert held(fleet) == [(fleet.version, report.checksum)] * 2
        assert max(canary.max for canary in report.canaries.values()) < MAX_DIFFERENCE
        published = fleet.config.run_dir / "published"
        assert [entry.name for entry in published.iterdir()] == [f"version-{fleet.version}"]


class Request:
    """A long response that is under way."""

    def __init__(self, address: ServerAddress, num_tokens: int) -> None:
        self.answer: Any = None
        self._url = address.url
        self._num_tokens = num_tokens
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        parameters = {"max_new_tokens": self._num_tokens, "temperature": TEMPERATURE, "ignore_eos": True}
        body = {"input_ids": CANARY_PROMPT, "sampling_params": parameters, "return_logprob": True}
        with requests.Session() as session:
            session.trust_env = False
            self.answer = session.post(f"{self._url}/generate", json=body, timeout=170).json()

    def wait(self) -> Any:
        self._thread.join(170)
        return self.answer


@pytest.mark.parametrize(
    "trainer", long_after(1, [{"pause_mode": mode} for mode in ("retract", "in_place", "abort")]), indirect=True
)
def test_requests_in_flight_live_through_it(fleet: Fleet, trainer: Trainer) -> None:
    mode = trainer.config.publish.pause_mode
    trainer.publish(fleet.step())
    num_tokens = 1000 if fleet.config.server.engine == "sglang" else 2000
    running = [Request(address, num_tokens) for address in fleet.addresses for _ in range(2)]
    for later in [Request(address, 10) for address in fleet.addresses]:
        later.wait()  # by then those before it have tokens
    report = trainer.publish(fleet.step(requests_in_flight=True))
    assert (report.held_by, report.failures) == ([0, 1], {})
    assert 0 < report.paused_s < report.total_s
    # also in a batch with sampling requests
    assert max(canary.max for canary in report.canaries.values()) < MAX_DIFFERENCE
    for request in running:
        answer = request.wait()
        meta = answer["meta_info"]
        spans = [(span["version"], span["start"], span["end"]) for span in meta["weight_versions"]]
        if mode == "abort":
            assert meta["finish_reason"]["type"] == "abort"
            assert 0 < len(answer["output_ids"]) < num_tokens
            assert [version for version, _, _ in spans] == [str(fleet.version - 1)]
        else:
            assert meta["finish_reason"]["type"] == "length"
            change = spans[0][2]
            assert 0 < change < num_tokens
            assert spans == [(str(fleet.version - 1), 0, change), (str(fleet.version), change, num_tokens)]
            assert len(answer["output_ids"]) == num_tokens


@pytest.mark.parametrize(
    "trainer", long_after(1, TRANSPORTS), indirect=True, ids=lambda settings: settings["transport"]
)
def test_a_server_that_dies_in_a_transfer_is_left_out_and_comes_back_later(fleet: Fleet, trainer: Trainer) -> None:
    trainer.publish(fleet.step())
    victim = fleet.processes[1]
    assert victim._process is not None
    process = psutil.Process(victim._process.pid)
    members = (process.pid, *(child.pid for child in process.children(recursive=True)))
    report = trainer.publish(fleet.step(killed=members))
    assert report.held_by == [0]
    assert list(report.failures) == [1]
    assert report.failures[1].startswith(f"server 1 at {victim.address.url}")
    assert report.transport == trainer.config.publish.transport
    assert report.total_s < trainer.config.publish.timeout_s
    survivor = fleet.control(0)
    assert (survivor.policy_version(), survivor.weights_checksum().engine) == (fleet.version, report.checksum)
    assert report.canaries[0].max < MAX_DIFFERENCE

    # the lease still names it: the trainer goes on without it
    report = trainer.publish(fleet.step())
    assert (report.held_by, list(report.failures)) == ([0], [1])

    stop_servers([victim])
    starts = victim.address.start
    victim.start()
    assert victim.wait_until_ready(170)
    assert victim.address.start == starts + 1
    # only the newcomer needs the version that the other holds already
    report = trainer.publish(Step(fleet.version, [victim.address], factor=1.0, changed=False))
    assert (report.held_by, report.failures) == ([1], {})
    report = trainer.publish(fleet.step())
    assert (report.held_by, report.failures, report.transport) == ([0, 1], {}, trainer.config.publish.transport)
    assert held(fleet) == [(fleet.version, report.checksum)] * 2


def test_faults_of_this_side_are_reported(fleet: Fleet, trainer: Trainer) -> None:
    trainer.publish(fleet.step())
    assert trainer.publish(fleet.step(rename="other.")).startswith(
        f"publishing version {fleet.version} changed no weight on the servers"
    )
    message = trainer.publish(fleet.step(bias=1.5))
    assert "server 0 at" in message
    assert "server 1 at" in message
    assert "differ from the trainer's by 1.5 nats per token" in message
    report = trainer.publish(Step(fleet.version, fleet.addresses, factor=1.0, changed=False))
    assert report.held_by == [0, 1]
    # other weights under the same version
    report = trainer.publish(Step(fleet.version, fleet.addresses, changed=False))
    assert report.held_by == []
    assert "its weights differ from the others" in report.failures[0]
    assert "its weights differ from the others" in report.failures[1]


def test_nobody_left_is_no_error(fleet: Fleet, trainer: Trainer) -> None:
    """The last test: it ends the servers."""
    stop_servers(fleet.processes)
    report = trainer.publish(fleet.step())
    assert (report.held_by, sorted(report.failures), report.transport) == ([], [0, 1], None)
    assert report.total_s < 10
