"""A bucket of weights goes through shared memory to another place on the GPU, as publish.transport = shared_memory
sends it to a server: the same bits, and the rates that the planner assumes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minpro_megatron.gpu_checks.meter import Meter
from minpro_megatron.gpu_checks.outcome import Figure, Limit, Outcome, judged
from minpro_megatron.publishing.sender import BucketMemory
from minpro_megatron.publishing.shared_memory import bucket_message, shared_bytes
from minpro_megatron.reference_engine.shared_buckets import read_bucket

ROUNDS = 3


@dataclass(frozen=True)
class Shapes:
    tensors: int
    elements: int  # of each tensor, bfloat16


_LIMITS = (Limit("tensors_different", at_most=0),)
FULL = (  # 512 MB in tensors of the size of an expert's projection
    Shapes(tensors=170, elements=768 * 2048),
    # half of the planner's rate: rank 0 writes one bucket while the servers read another
    (*_LIMITS, Limit("write_gb_per_s", at_least=3.2), Limit("read_gb_per_s", at_least=3.2)),
)
SMALL = (Shapes(tensors=5, elements=1000), _LIMITS)


def check(
    device: torch.device,
    shapes: Shapes,
    limits: tuple[Limit, ...],
    meter: Meter | None = None,
    read: Callable[[str], list[tuple[str, Tensor]]] = read_bucket,
) -> Outcome:
    """The second of the two buffers is filled too, because each bucket uses the other one."""
    meter = meter or Meter(device)
    random = torch.Generator(device).manual_seed(0)
    bucket = [
        (f"tensor {place}", torch.randn(shapes.elements, generator=random, device=device, dtype=torch.bfloat16))
        for place in range(shapes.tensors)
    ]
    tensors = [tensor for _, tensor in bucket]
    num_bytes = sum(tensor.nbytes for tensor in tensors)
    memory = BucketMemory(lambda size, _: shared_bytes(size))
    memory.fill(tensors)  # makes the buffers, whose pages the system clears
    flat = memory.fill(tensors)
    figures: dict[str, Figure] = {"bytes": num_bytes}
    figures["write_gb_per_s"] = num_bytes / meter.median_seconds(lambda: memory.fill(tensors), ROUNDS) / 1e9
    received = read(bucket_message(bucket, flat))
    loaded = [torch.empty_like(tensor) for tensor in tensors]

    def load() -> None:
        for place, (_, tensor) in zip(loaded, received, strict=True):
            place.copy_(tensor)

    figures["read_gb_per_s"] = num_bytes / meter.median_seconds(load, ROUNDS) / 1e9
    figures["tensors_different"] = sum(
        name != own_name or not torch.equal(own, found)
        for (own_name, own), (name, _), found in zip(bucket, received, loaded, strict=True)
    )
    return judged(figures, limits)
