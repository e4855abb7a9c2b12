"""What a machine with GPUs needs besides the Python packages: a driver of their CUDA version, and a C compiler."""

import ctypes
import os
import shutil
from collections.abc import Iterator

# environment/constraints.txt pins packages of CUDA 13.0, which needs a driver of release 580 or later (NVIDIA's CUDA
# Compatibility guide, table of minor version compatibility).
_NEEDED_CUDA, _NEEDED_DRIVER = 13_000, 580


def driver_cuda_version() -> int:
    """The newest CUDA version that this machine's driver supports, as 13000 for 13.0; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    version = ctypes.c_int(0)
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else 0


def c_compiler() -> str | None:
    """The C compiler that Triton would call, in its order of search; None without one."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def software_problems(cuda_version: int, compiler: str | None) -> Iterator[str]:
    """A line for each reason why the pinned packages cannot work on a machine with GPUs. `cuda_version`: of its driver;
    0 is reported elsewhere, as missing GPUs."""
    if 0 < cuda_version < _NEEDED_CUDA:
        major, minor = cuda_version // 1000, cuda_version % 1000 // 10
        yield (
            f"device = cuda: this machine's NVIDIA driver supports CUDA {major}.{minor}, and the pinned packages need "
            f"13.0: install a driver of release {_NEEDED_DRIVER} or later"
        )
    if compiler is None:
        yield (
            "device = cuda: no C compiler, which torch.compile and Triton call for every kernel that they build: "
            "install gcc, or name a compiler in the environment variable CC"
        )
