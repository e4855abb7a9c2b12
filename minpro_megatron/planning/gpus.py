"""The kinds of GPU for which a run can be planned, from the manufacturers' data sheets."""

from dataclasses import dataclass

from minpro_megatron.command_line import did_you_mean
from minpro_megatron.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class GpuKind:
    """The properties of one GPU of a node. Bandwidths are of one direction, in bytes per second, without any
    discount."""

    name: str
    memory_bytes: int  # as reported by the driver: the GB in the name are about the same number of GiB
    flops: float  # dense products of bfloat16 (cpu: float32) operands, per second
    memory_bandwidth: float
    node_bandwidth: float  # to the other GPUs of the node (NVLink)
    network_bandwidth: float  # a GPU's share of the node's network (InfiniBand)
    host_bandwidth: float  # to the host's memory (PCIe)
    host_memory_bytes: int  # of a node
    gpus_per_node: int
    source: str


_HOPPER_LINKS = {"node_bandwidth": 450e9, "network_bandwidth": 50e9, "host_bandwidth": 64e9, "gpus_per_node": 8}
_H100_SHEET = (
    "NVIDIA H100 Tensor Core GPU data sheet (SXM: 989 dense BF16 TFLOPS, 3.35 TB/s, NVLink 900 GB/s both ways)"
)
_H200_SHEET = "NVIDIA H200 Tensor Core GPU data sheet (SXM: 989 dense BF16 TFLOPS, 4.8 TB/s, NVLink 900 GB/s both ways)"
_H20_SHEET = (
    "willitrunai.com/gpus/h20-96gb and H20 system vendors' sheets (148 dense BF16 TFLOPS, 4.0 TB/s, NVLink 900 GB/s "
    "both ways); NVIDIA has no public sheet"
)
_A100_SHEET = "NVIDIA A100 80GB data sheet (SXM: 312 dense BF16 TFLOPS, 2.039 TB/s, NVLink 600 GB/s both ways)"

GPU_KINDS: dict[str, GpuKind] = {
    kind.name: kind
    for kind in (
        GpuKind(
            name="h100-80gb",
            memory_bytes=79 * GIB,
            flops=989e12,
            memory_bandwidth=3.35e12,
            host_memory_bytes=2000 * GIB,
            source=f"{_H100_SHEET}; DGX H100 user guide (a 400 Gb/s ConnectX-7 per GPU, PCIe 5.0, 2 TB host memory)",
            **_HOPPER_LINKS,
        ),
        GpuKind(
            name="h200-141gb",
            memory_bytes=139 * GIB,
            flops=989e12,
            memory_bandwidth=4.8e12,
            host_memory_bytes=2000 * GIB,
            source=f"{_H200_SHEET}; DGX H200 user guide (a 400 Gb/s ConnectX-7 per GPU, PCIe 5.0, 2 TB host memory)",
            **_HOPPER_LINKS,
        ),
        GpuKind(
            name="h20-96gb",
            memory_bytes=95 * GIB,
            flops=148e12,
            memory_bandwidth=4.0e12,
            host_memory_bytes=1800 * GIB,
            source=_H20_SHEET,
            **_HOPPER_LINKS,
        ),
        GpuKind(
            name="a100-80gb",
            memory_bytes=79 * GIB,
            flops=312e12,
            memory_bandwidth=2.039e12,
            node_bandwidth=300e9,
            network_bandwidth=25e9,
            host_bandwidth=32e9,
            host_memory_bytes=1900 * GIB,
            gpus_per_node=8,
            source=f"{_A100_SHEET}; DGX A100 user guide (a 200 Gb/s ConnectX-6 per GPU, PCIe 4.0, 2 TB host memory)",
        ),
        GpuKind(
            name="cpu",
            memory_bytes=4 * GIB,
            flops=5e10,
            memory_bandwidth=10e9,
            node_bandwidth=1e9,
            network_bandwidth=1e9,
            host_bandwidth=10e9,
            host_memory_bytes=16 * GIB,
            gpus_per_node=8,
            source="one core of an ordinary machine, rounded; for tests and tiny models",
        ),
    )
}


def gpu_kind(name: str) -> GpuKind:
    """The kind with this name. Raises UserError for a kind that is not in the table."""
    if name not in GPU_KINDS:
        raise UserError(
            f"gpu = {name}: not known{did_you_mean(name, GPU_KINDS)}; known: {', '.join(GPU_KINDS)}; add it to "
            "planning/gpus.py"
        )
    return GPU_KINDS[name]
