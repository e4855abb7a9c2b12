"""Weights in shared memory: what a server reads of them, what it refuses to read, and what a failure leaves behind."""

import base64
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor

from minpro_megatron.files.disk_space import SHARED_MEMORY
from minpro_megatron.publishing.shared_memory import SharedMemorySender, bucket_message, shared_bytes
from minpro_megatron.records import ServerAddress
from minpro_megatron.reference_engine.shared_buckets import read_bucket
from minpro_megatron.reference_engine.update_groups import UpdateRefused
from minpro_megatron.serving.calls import ServersFailed
from minpro_megatron.serving.control import ServerControl
from tests.support.recorded_server import OK, RecordedServer

PATH = "update_weights_from_tensor"


def bucket(start: float) -> list[tuple[str, Tensor]]:
    """Tensors of several dtypes, one of them not contiguous and one at an address that is no multiple of its dtype."""
    numbers = torch.arange(12, dtype=torch.float32) + start
    return [("a", numbers.view(3, 4).t()), ("b", numbers.bfloat16()[:3]), ("c", numbers.view(2, 6))]


def equal(found: list[tuple[str, Tensor]], wanted: list[tuple[str, Tensor]]) -> bool:
    return [name for name, _ in found] == [name for name, _ in wanted] and all(
        one.dtype == two.dtype and torch.equal(one, two) for (_, one), (_, two) in zip(found, wanted, strict=True)
    )


class ReadingServer(RecordedServer):
    """Reads every message as soon as it arrives, as a server does."""

    def __init__(self) -> None:
        super().__init__(hang_s=0.3)
        self.read: list[list[tuple[str, Tensor]]] = []
        server = self

        class Received(list):
            def append(self, request: Any) -> None:
                server.read += [read_bucket(one) for one in (request[1] or {}).get("serialized_named_tensors", [])]
                super().append(request)

        self.received = Received()


@pytest.fixture
def servers() -> Iterator[list[ReadingServer]]:
    made = [ReadingServer(), ReadingServer()]
    yield made
    for server in made:
        server.close()


MakeSender = Callable[..., SharedMemorySender]


@pytest.fixture
def connected(servers: list[ReadingServer]) -> MakeSender:
    def make(timeout_s: float = 30.0) -> SharedMemorySender:
        addresses = [
            ServerAddress(index=index, url=servers[index].url, tensor_parallel=1 + index) for index in range(2)
        ]
        sender = SharedMemorySender()
        sender.connect({one.index: ServerControl(one, timeout_s if one.index else 30.0) for one in addresses})
        return sender

    return make


def test_each_process_of_each_server_reads_every_bucket(servers: list[ReadingServer], connected: MakeSender) -> None:
    sender = connected()
    sent = [bucket(start) for start in (0.0, 100.0, 200.0, 300.0)]
    for number, one in enumerate(sent):
        sender.send(one, number)
    sender.finish()
    assert torch.multiprocessing.get_sharing_strategy() == "file_descriptor"  # torch's default is in place again
    for server, times in ((servers[0], 1), (servers[1], 2)):  # the second has two tensor-parallel ranks
        assert [body["weight_version"] for _, body in server.received] == ["0", "1", "2", "3"]
        assert {(body["load_format"], body["flush_cache"]) for _, body in server.received} == {
            ("flattened_bucket", False)
        }
        wanted = [one for one in sent for _ in range(times)]
        assert all(equal(found, one) for found, one in zip(server.read, wanted, strict=True))


def test_two_buffers_serve_all_transfers(servers: list[ReadingServer], connected: MakeSender) -> None:
    before = segments()
    sender = connected()
    for _ in range(2):
        sender.connect(sender._controls)
        for start in (0.0, 1.0, 2.0):
            sender.send(bucket(start), 1)
        sender.finish()
        assert len(segments() - before) == 2
    del sender
    assert servers[0].read
    assert segments() == before  # every message was read, so torch has removed the memory


def segments() -> set[str]:
    return {path.name for path in SHARED_MEMORY.glob(f"torch_{os.getpid()}_*")}


def test_a_failure_names_server_and_bucket(servers: list[ReadingServer], connected: MakeSender) -> None:
    servers[1].once[PATH] = [(200, OK), (400, {"success": False, "message": "wrong shape"})]
    sender = connected()
    sender.send(bucket(0.0), 1)
    sender.send(bucket(1.0), 1)
    with pytest.raises(ServersFailed) as raised:
        sender.finish()
    line = f"server 1 at {servers[1].url}, {PATH}: status 400: wrong shape (bucket 2, which begins with a)"
    assert raised.value.failures == {1: line}
    assert len(servers[0].read) == 2  # the other server has both


def test_a_server_that_hangs_does_not_hold_the_transfer(servers: list[ReadingServer], connected: MakeSender) -> None:
    servers[1].hung = {PATH}
    sender = connected(timeout_s=0.1)
    sender.send(bucket(0.0), 1)
    with pytest.raises(ServersFailed, match=r"no answer within 0.1 s \(bucket 1, which begins with a\)"):
        sender.send(bucket(1.0), 1)


@pytest.mark.parametrize("harmful", [os.system, torch.load, Path, getattr], ids=lambda one: one.__name__)
def test_a_message_with_another_name_is_refused(harmful: object) -> None:
    message = base64.b64encode(pickle.dumps({"flattened_tensor": harmful, "metadata": []})).decode()
    with pytest.raises(UpdateRefused, match=rf"the message names \S+\.{harmful.__name__}, which"):  # type: ignore[attr-defined]
        read_bucket(message)


@pytest.mark.parametrize("message", ["", "not base64", base64.b64encode(b"\x80\x05N.").decode()])
def test_a_damaged_message_is_refused(message: str) -> None:
    with pytest.raises(UpdateRefused, match="Failed to read the bucket"):
        read_bucket(message)


def test_a_message_is_a_description(connected: MakeSender) -> None:
    flat = shared_bytes(1 << 20)
    one = [("a", flat.view(torch.float32).normal_())]  # memory as it comes may hold no number
    message = bucket_message(one, flat)
    assert len(message) < 1000
    assert equal(read_bucket(message), one)


KILLED = """
import sys, time
from minpro_megatron.publishing.shared_memory import shared_bytes
memory = shared_bytes(1 << 20)
print("made", flush=True)
time.sleep(60)
"""


@pytest.mark.long
def test_the_memory_of_a_killed_trainer_is_removed() -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "made\n"
    pattern = f"torch_{process.pid}_*"
    assert len(list(SHARED_MEMORY.glob(pattern))) == 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while list(SHARED_MEMORY.glob(pattern)):
        assert time.monotonic() < deadline, "the memory is still there"
        time.sleep(0.05)


TOO_LARGE = """
from minpro_megatron.publishing.shared_memory import shared_bytes
from minpro_megatron.publishing.sender import PublishError
try:
    shared_bytes(4 << 20)
except PublishError as error:
    print(error)
"""


@pytest.mark.long
def test_too_little_shared_memory_is_one_line_with_the_remedy() -> None:
    own = f"mount -t tmpfs -o size=1m tmpfs {SHARED_MEMORY} && exec \"$0\" -c '{TOO_LARGE}'"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", own, sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this machine gives no file system of its own to a test: {done.stderr.strip()[-200:]}")
    assert done.stdout == (
        "publish.transport = shared_memory: one of two buckets needs 4.2 MB of shared memory, and /dev/shm has 1.0 MB "
        "free: enlarge it (docker run --shm-size), lower publish.bucket_bytes, or set publish.transport to broadcast, "
        "or to disk with server.placement = shared\n"
    )
