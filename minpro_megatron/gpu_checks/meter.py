"""Measures work on a device: seconds, bytes of the allocator, waits of the host, and the rate of a matrix product."""

import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

# Sizes of the square product whose rate is the limit that shares refer to.
_PRODUCT_SIZE = {"cuda": 8192, "cpu": 256}
_PRODUCTS = 10


class Meter:
    """On a GPU seconds are those between CUDA events, and bytes are the allocator's. On a CPU there are no counters of
    bytes and waits: those measurements do the work and return None."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._counts = device.type == "cuda"

    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds from the start of the work until the device has finished it."""
        if not self._counts:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def median_seconds(self, work: Callable[[], object], rounds: int) -> float:
        return statistics.median(self.seconds(work) for _ in range(rounds))

    def held_bytes(self) -> int | None:
        """Bytes of tensors now."""
        if not self._counts:
            return None
        torch.cuda.synchronize(self.device)
        return torch.cuda.memory_allocated(self.device)

    def reserved_bytes(self) -> int | None:
        """Bytes that the allocator keeps from other processes: those of tensors, and its cache."""
        if not self._counts:
            return None
        torch.cuda.synchronize(self.device)
        return torch.cuda.memory_reserved(self.device)

    def peak_bytes(self, work: Callable[[], object]) -> int | None:
        """The most bytes of tensors during the work, above those before it."""
        if not self._counts:
            work()
            return None
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        work()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def host_waits(self, work: Callable[[], object]) -> int | None:
        """How often the host waits for the device during the work, as far as torch's synchronisation debug mode sees
        it: copies to the host, .item(), and waits for streams."""
        if not self._counts:
            work()
            return None
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                work()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("called a synchronizing" in str(warning.message) for warning in seen)

    def product_rate(self, dtype: torch.dtype) -> float:
        """Operations per second of a large square matrix product of random numbers."""
        size = _PRODUCT_SIZE[self.device.type]
        factor = torch.randn(size, size, dtype=dtype, device=self.device)
        out = torch.empty_like(factor)

        def products() -> None:
            for _ in range(_PRODUCTS):
                torch.mm(factor, factor, out=out)

        products()
        return _PRODUCTS * 2 * size**3 / self.median_seconds(products, rounds=3)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected value; infinite if `found` is not finite, or not 0 where
    everything expected is 0."""
    if not expected.numel():
        return 0.0
    difference = (found.double() - expected.double()).abs().max().item()
    largest = expected.double().abs().max().item()
    if not difference < float("inf"):
        return float("inf")
    return difference / largest if largest else (float("inf") if difference else 0.0)
