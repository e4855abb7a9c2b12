"""Two server processes under `serve`: one is killed, one stops answering; groups move, servers come back.

The servers are the reference engine's, which start in seconds.
"""

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests

from minpro_megatron.config.run import RunConfig
from minpro_megatron.records import CollectedGroup, IssuedGroup, Prompt, ServerAddress
from minpro_megatron.rollout.fleet import Fleet
from minpro_megatron.rollout.generation import GroupCollector
from minpro_megatron.serving.api_key import authorization
from minpro_megatron.serving.client import SamplingParameters
from minpro_megatron.serving.model_files import read_model_facts
from tests.e2e.conftest import ROOT
from tests.e2e.test_serving import save_random_model
from tests.unit.test_fleet import FakeRewards, FakeTokenizer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

KEY = "k-51f0c2e9d7"
INCARNATION = 3
MAX_RESPONSE_TOKENS = 24
SAMPLING = SamplingParameters(1.0, MAX_RESPONSE_TOKENS)


@dataclass
class Serving:
    """The role `serve` as a process."""

    config: RunConfig
    process: subprocess.Popen[str]

    def servers(self) -> dict[int, psutil.Process]:
        """The server processes by their ports."""
        found = {}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            line = child.cmdline()
            if "--port" in line:
                found[int(line[line.index("--port") + 1])] = child
        return found

    def process_of(self, address: ServerAddress) -> psutil.Process:
        return self.servers()[int(address.url.rpartition(":")[2])]


@pytest.fixture
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    monkeypatch.setenv("THE_KEY", KEY)
    save_random_model(tmp_path / "hf", seed=0)
    config = RunConfig.model_validate(
        {
            "name": "fleet",
            "runs_dir": str(tmp_path / "runs"),
            "device": "cpu",
            "model": {"hf_path": str(tmp_path / "hf"), "megatron_path": "unused", "dtype": "float32"},
            "data": {"train_file": "unused", "heldout_file": "unused"},
            "sampling": {"max_prompt_tokens": 8, "max_response_tokens": MAX_RESPONSE_TOKENS},
            "server": {
                "engine": "reference",
                "count": 2,
                "device": "cpu",
                "dtype": "float32",
                "start_timeout_s": 150,
                "health_interval_s": 0.5,
                "unhealthy_after_s": 4,
                "max_restarts": 1,
                "api_key_variable": "THE_KEY",
            },
        }
    )
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "run.json").write_text(config.to_json())
    command = [sys.executable, "-m", "minpro_megatron", "serve"]
    command += ["--config", str(config.run_dir / "run.json"), "--incarnation", str(INCARNATION)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield Serving(config, process)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def issued(group_id: int, version: int) -> IssuedGroup:
    return IssuedGroup(
        group_id=group_id,
        batch_index=0,
        policy_version=version,
        prompt=Prompt(id=f"p{group_id}", source="test", text="1=", answer="1"),
        prompt_token_ids=np.asarray([5, 6, 7 + group_id % 8], dtype=np.int32),
        sampling_seeds=list(range(4 * group_id, 4 * group_id + 4)),
    )


class Work:
    """Groups through the fleet, each checked."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._groups = GroupCollector(fleet, FakeRewards(), FakeTokenizer())  # type: ignore[arg-type]

    async def collect(self, count: int, version: int) -> list[CollectedGroup]:
        collected = await asyncio.gather(
            *(self._groups.collect(issued(number, version), SAMPLING) for number in range(count))
        )
        for group in collected:
            assert len(group.responses) == 4
            for response in group.responses:
                assert (response.policy_versions == version).all()
                assert np.isfinite(response.rollout_log_probs).all()
        return list(collected)

    def tokens_of(self, index: int) -> float:
        return self._fleet.metrics().get(f"fleet/tokens/{index}", 0)


async def until(condition: Callable[[], bool]) -> None:
    """The whole test has a time limit: what happens in seconds here may take minutes elsewhere."""
    while not condition():
        await asyncio.sleep(0.05)


def ask(config: RunConfig, address: ServerAddress, path: str, **body: Any) -> requests.Response:
    return requests.post(f"{address.url}/{path}", json=body, headers=authorization(config.server), timeout=60)


def has_begun(config: RunConfig, address: ServerAddress) -> bool:
    """Whether a response has tokens: the server cannot empty its cache."""
    return ask(config, address, "flush_cache").status_code != 200


def publish(config: RunConfig, addresses: list[ServerAddress], version: int) -> None:
    """The same weights once more under the name of `version`."""
    for address in addresses:
        what = {"model_path": config.model.hf_path, "weight_version": str(version), "flush_cache": True}
        answer = ask(config, address, "update_weights_from_disk", **what)
        assert answer.json()["success"], answer.text


def test_servers_die_hang_and_come_back(serving: Serving) -> None:
    config = serving.config

    async def main() -> None:
        async with Fleet(config, read_model_facts(config.model.hf_path), INCARNATION) as fleet:
            work = Work(fleet)
            await fleet.wait_until_ready(300)
            by_seed = [
                [response.token_ids.tolist() for response in group.responses] for group in await work.collect(16, 0)
            ]
            assert work.tokens_of(0) > 0
            assert work.tokens_of(1) > 0
            check_that_the_key_is_needed_and_hidden(serving, fleet.members())

            publish(config, fleet.members(), 1)
            fleet.set_version(1, [0, 1])
            await until(lambda: fleet.metrics()["fleet/current"] == 2)
            first = fleet.members()[0]
            pending = asyncio.create_task(work.collect(24, 1))
            while not await asyncio.to_thread(has_begun, config, first):
                pass
            # paused, so that it has responses when it is killed, however fast it is
            await asyncio.to_thread(ask, config, first, "pause_generation", mode="in_place")
            await until(lambda: fleet.metrics()["fleet/groups"] >= 20)
            assert not pending.done()
            serving.process_of(first).kill()
            repeated = await pending
            # the weights and seeds are those of before: what a moved group has lost is sampled again, token by token
            assert [[r.token_ids.tolist() for r in group.responses] for group in repeated[:16]] == by_seed
            metrics = fleet.metrics()
            assert metrics["fleet/moved_groups"] + metrics["fleet/retries"] >= 1

            await until(lambda: (0, 1) in [(address.index, address.start) for address in fleet.members()])
            assert [(address.index, address.start) for address in fleet.outdated()] == [(0, 1)]
            tokens = work.tokens_of(0)
            await work.collect(16, 1)
            assert work.tokens_of(0) == tokens  # it holds version 0, and gets no work
            publish(config, fleet.outdated(), 1)
            fleet.set_version(1, [0, 1])
            await until(lambda: fleet.metrics()["fleet/current"] == 2)
            await work.collect(16, 1)
            assert work.tokens_of(0) > tokens

            pending = asyncio.create_task(work.collect(24, 1))
            serving.process_of(fleet.members()[1]).suspend()
            await pending
            await until(lambda: (1, 1) in [(address.index, address.start) for address in fleet.members()])
            assert fleet.metrics()["fleet/restarts"] == 2

            serving.process_of(fleet.members()[0]).kill()
            await until(lambda: serving.process.poll() is not None)

    left = psutil.Process(serving.process.pid).children(recursive=True)
    asyncio.run(asyncio.wait_for(main(), 360))
    assert serving.process.returncode == 1
    output = serving.process.stdout.read() if serving.process.stdout else ""
    assert "restart 1 of at most 1" in output
    assert "no answer to /model_info for server.unhealthy_after_s = 4 s" in output
    assert "serve: failed again after server.max_restarts = 1 restarts: server 0" in output
    assert "ended by signal SIGKILL; the end of" in output
    deadline = time.monotonic() + 30
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in left):
        assert time.monotonic() < deadline, "a server has outlived its role"
        time.sleep(0.05)


def check_that_the_key_is_needed_and_hidden(serving: Serving, addresses: list[ServerAddress]) -> None:
    assert requests.get(f"{addresses[0].url}/model_info", timeout=5).status_code == 401
    wrong = {"Authorization": "Bearer other"}
    assert requests.get(f"{addresses[0].url}/model_info", headers=wrong, timeout=5).status_code == 401
    for process in [psutil.Process(serving.process.pid), *serving.servers().values()]:
        assert KEY not in " ".join(process.cmdline())
    for path in serving.config.run_dir.rglob("*"):
        assert not path.is_file() or KEY not in path.read_text(errors="replace"), path
