"""What is found on fake tensors: bytes, mismatches, waits for the device, and wrong collectives."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from minpro_megatron.rehearsal.observer import Observer

RANKS = 4


@pytest.fixture
def observer() -> Iterator[Observer]:
    with FakeTensorMode(allow_non_fake_inputs=True), Observer() as made:
        yield made


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    yield
    dist.destroy_process_group()


def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


def test_bytes_count_from_allocation_to_release(observer: Observer) -> None:
    memory = observer.memory
    with memory.in_phase("outer"):
        kept = on_gpu(1000)
        with memory.in_phase("inner"):
            released = on_gpu(3000)
            view = released[:10]  # the same storage
            on_host = torch.empty(50, dtype=torch.float32)
            del released, view
    phases = memory.phases
    assert phases["outer > inner"].entry["cuda"] == kept.nbytes == 2000
    assert phases["outer"].peak == phases["outer > inner"].peak == {"cuda": 8000, "cpu": on_host.nbytes}
    assert phases["outer"].left == {"cuda": 2000, "cpu": 200}
    ((line, size),) = phases["outer"].peak_lines["cuda"]
    assert (size, line.endswith(" on_gpu")) == (8000, True)
    ((line, size),) = phases["outer > inner"].peak_lines["cpu"]
    assert (size, line.endswith(" test_bytes_count_from_allocation_to_release")) == (200, True)
    left = phases["outer"].left_lines
    assert {device: [size for _, size in lines] for device, lines in left.items()} == {"cuda": [2000], "cpu": [200]}


def test_a_storage_that_is_emptied_and_filled_again_counts_as_it_is(observer: Observer) -> None:
    memory, kept = observer.memory, on_gpu(1000)
    with memory.watching_resizes():
        with memory.in_phase("emptied"):
            kept.untyped_storage().resize_(0)
        with memory.in_phase("filled"):
            kept.untyped_storage().resize_(2000)
    phases = memory.phases
    assert (phases["emptied"].entry, phases["emptied"].left) == ({"cuda": 2000}, {})
    assert (phases["filled"].entry, phases["filled"].left) == ({"cuda": 0}, {"cuda": 2000})
    del kept
    with memory.in_phase("released") as released:
        pass
    assert released.left == {}


def test_a_compiled_function_takes_no_memory_for_what_it_does_not_return(observer: Observer) -> None:
    with observer.memory.in_phase("one"):
        given = on_gpu(1000)
        observer.compiled(lambda values: (values + 1) * 2)(given)
    assert observer.memory.phases["one"].peak["cuda"] == 4000


def test_operands_of_two_dtypes_are_a_problem_although_their_shapes_fit(observer: Observer) -> None:
    with observer.memory.in_phase("update"):
        out = on_gpu(2, 2, dtype=torch.float32)
        torch.addmm(out, on_gpu(2, 3), on_gpu(3, 2), out=out)
    (problem,) = observer.problems
    assert problem.startswith("update: aten.addmm.out of several dtypes: ['torch.bfloat16', 'torch.float32'] (")


@pytest.mark.usefixtures("observer")
def test_operands_on_two_devices_are_refused() -> None:
    with pytest.raises(RuntimeError, match="device"):
        torch.add(on_gpu(3), torch.empty(3))


def test_every_wait_for_the_device_is_noted(observer: Observer) -> None:
    values, mask = on_gpu(6), on_gpu(6, dtype=torch.bool)
    assert values.sum().item() == 1.0
    assert values[mask].shape == (6,)
    assert torch.nonzero(values).shape == (6, 1)
    values.cpu()
    values[mask] = 0.0  # one kernel, which does not count the mask
    assert [(read.kind, read.count) for read in observer.host_reads] == [
        ("boolean index", 1),
        ("copy to host", 1),
        ("item", 1),
        ("nonzero", 1),
    ]


@pytest.mark.usefixtures("group")
def test_a_correct_collective_is_recorded(observer: Observer) -> None:
    for _ in range(2):
        dist.all_gather_single(on_gpu(RANKS * 8), on_gpu(8))
    (found,) = observer.collectives.found
    assert (found.name, found.backend, found.device, found.dtype) == ("allgather_base", "nccl", "cuda", "bfloat16")
    assert (found.num_bytes, found.count) == (RANKS * 16, 2)
    assert found.group.endswith(f"[{RANKS}]")
    assert not observer.problems


@pytest.mark.usefixtures("group")
def test_a_wrong_collective_is_a_problem(observer: Observer) -> None:
    dist.all_reduce(torch.empty(8))
    dist.reduce_scatter_single(on_gpu(4), on_gpu(8))
    dist.all_gather_single(on_gpu(RANKS * 8), on_gpu(8, 2)[:, 0])
    dist.all_to_all_single(on_gpu(8), on_gpu(8), [2, 2, 2, 2], [2, 2, 2, 1])
    found = [problem.split(": ", 1)[1] for problem in observer.problems]
    expected = [
        "a host tensor is sent by NCCL",
        "8 elements on one side, 4 x 4 on the other",
        "not contiguous: [(8,)]",
        "splits [2, 2, 2, 1] of a tensor of (8,) for 4 ranks",
    ]
    assert len(found) == len(expected)
    for problem, text in zip(found, expected, strict=True):
        assert text in problem
