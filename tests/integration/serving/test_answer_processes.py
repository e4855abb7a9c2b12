"""Large answers are checked in other processes, with the same results; the processes may end and never stay behind."""

import asyncio
import base64
import dataclasses
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest

from minpro_megatron.serving import answer_processes
from minpro_megatron.serving.answer_processes import LARGE_ANSWER_BYTES, AnswerProcesses
from minpro_megatron.serving.answers import AnswerChecker, SampledSequence, SentRequest
from minpro_megatron.serving.errors import InvalidAnswer, WrongPolicyVersion
from tests.support.sglang_answers import FACTS, Answer, answer

MIXTURE = dataclasses.replace(FACTS, num_layers=2, num_experts=300, experts_per_token=3)
IDS = ["a" * 32, "b" * 32]
NUM_TOKENS = 2000
CHECKER = AnswerChecker("server 5", MIXTURE, exact_versions=True)


def requests(replayed: bool) -> list[SentRequest]:
    """`replayed`: with routes and kept ids."""
    return [SentRequest(request_id, 3, NUM_TOKENS, 3, replayed, 4 if replayed else 0) for request_id in IDS]


def body(change: Callable[[list[Answer]], object] = lambda made: None, replayed: bool = False) -> bytes:
    """Two responses, of NUM_TOKENS and NUM_TOKENS - 1 tokens."""
    made = []
    for request_id, length in zip(IDS, (NUM_TOKENS, NUM_TOKENS - 1), strict=True):
        tokens = [(7 * place) % 250 for place in range(length)]
        tokens[-1] = 258 if length < NUM_TOKENS else 9
        made.append(answer(request_id, tokens))
        if replayed:
            kept = [[token, 250 + token] for token in tokens]
            made[-1]["meta_info"]["output_token_sampling_mask"] = kept
            made[-1]["meta_info"]["output_token_sampling_logprobs"] = [-0.5] * length
            routes = np.random.default_rng(length).integers(0, 300, (length + 2, 2, 3), dtype="<i4")
            made[-1]["meta_info"]["routed_experts"] = base64.b64encode(routes.tobytes()).decode()
    change(made)
    encoded = msgspec.json.encode(made)
    assert len(encoded) > LARGE_ANSWER_BYTES
    return encoded


@pytest.fixture
def processes() -> Iterator[AnswerProcesses]:
    with AnswerProcesses(MIXTURE, num_processes=2) as started:
        yield started


def workers(parent: psutil.Process | None = None) -> list[psutil.Process]:
    children = (parent or psutil.Process()).children()
    return [child for child in children if answer_processes.WORKER_MODULE in child.cmdline()]


def check(processes: AnswerProcesses, data: bytes, replayed: bool = False) -> list[SampledSequence]:
    return asyncio.run(processes.check(CHECKER, data, requests(replayed)))


def assert_equal(found: list[SampledSequence], expected: list[SampledSequence]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.finish_reason == other.finish_reason
        for name in ("token_ids", "log_probs", "policy_versions", "routed_experts", "supports"):
            values, wanted = getattr(one, name), getattr(other, name)
            assert (values is None) == (wanted is None)
            if wanted is not None:
                assert values.dtype == wanted.dtype
                assert np.array_equal(values, wanted)


@pytest.mark.parametrize("replayed", [False, True])
def test_the_result_is_that_of_the_checker(processes: AnswerProcesses, replayed: bool) -> None:
    data = body(replayed=replayed)
    expected = CHECKER.check(data, requests(replayed))
    assert [len(sequence.token_ids) for sequence in expected] == [NUM_TOKENS, NUM_TOKENS - 1]
    assert_equal(check(processes, data, replayed), expected)


def wrong_version(made: list[Answer]) -> None:
    made[1]["meta_info"]["weight_versions"][0]["version"] = "4"


def wrong_token(made: list[Answer]) -> None:
    made[1]["output_ids"][5] = 511


@pytest.mark.parametrize(("change", "kind"), [(wrong_version, WrongPolicyVersion), (wrong_token, InvalidAnswer)])
def test_a_refusal_is_that_of_the_checker(
    processes: AnswerProcesses, change: Callable[[list[Answer]], object], kind: type[InvalidAnswer]
) -> None:
    data = body(change)
    with pytest.raises(InvalidAnswer) as expected:
        CHECKER.check(data, requests(False))
    with pytest.raises(InvalidAnswer) as found:
        check(processes, data)
    assert type(found.value) is type(expected.value) is kind
    assert str(found.value) == str(expected.value)
    assert_equal(check(processes, body()), CHECKER.check(body(), requests(False)))  # the process goes on


def test_a_process_starts_when_an_answer_needs_it(processes: AnswerProcesses) -> None:
    with pytest.raises(InvalidAnswer):
        check(processes, b"[]")
    assert workers() == []
    for _ in range(3):  # the second process is for answers that arrive at the same time
        check(processes, body())
        assert len(workers()) == 1


def test_a_killed_process_is_replaced(processes: AnswerProcesses, caplog: pytest.LogCaptureFixture) -> None:
    check(processes, body())
    (worker,) = workers()
    worker.kill()
    with caplog.at_level(logging.WARNING):
        assert_equal(check(processes, body()), CHECKER.check(body(), requests(False)))
    assert "a process that checks answers ended with status -9" in caplog.text
    assert [child.pid for child in workers()] != [worker.pid]


def test_an_answer_that_ends_two_processes_is_refused(
    processes: AnswerProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_processes, "WORKER_MODULE", "minpro_megatron.no_such_module")
    with pytest.raises(InvalidAnswer, match=r"server 5, request a+, body: .* has ended twice"):
        check(processes, body())


def test_no_process_stays_when_checks_are_given_up() -> None:
    async def main() -> None:
        with AnswerProcesses(MIXTURE, num_processes=1) as processes:
            data = body()
            running = [asyncio.create_task(processes.check(CHECKER, data, requests(False))) for _ in range(5)]
            await running[0]
            (worker,) = workers()
            worker.suspend()  # the second check does not end
            await asyncio.sleep(0.05)
            for task in running[1:]:
                task.cancel()

    asyncio.run(asyncio.wait_for(main(), 60))
    assert workers() == []


def test_a_process_ends_with_a_collector_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "body").write_bytes(body())
    script = (
        "import asyncio, pathlib, sys, time; from tests.integration.serving.test_answer_processes import *\n"
        "processes = AnswerProcesses(MIXTURE, 1)\n"
        "check(processes, pathlib.Path(sys.argv[1]).read_bytes()); print(workers()[0].pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "body")], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        os.kill(parent.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
