"""Detects an NVIDIA driver on this machine.

As a program: exits 0 and prints what was found if there is a driver, else exits 1 and prints nothing.
Standard library only, because set-up runs this file before it installs anything.
"""

import ctypes
import sys
from pathlib import Path

# Written by the kernel module itself, so it is there inside containers whose libcuda is not mounted.
KERNEL_MODULE_VERSION = Path("/proc/driver/nvidia/version")


def find_cuda_driver() -> str | None:
    """Return the evidence of a CUDA driver, or None.

    Checks for the driver, not for a usable device: with CUDA_VISIBLE_DEVICES empty, or on a login node that
    shares its environment with GPU nodes, the real kernel packages import and must not be replaced.
    """
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pass
    else:
        return "libcuda.so.1"
    if KERNEL_MODULE_VERSION.exists():
        return str(KERNEL_MODULE_VERSION)
    return None


def refuse_if_cuda_driver(what: str) -> None:
    """Raise RuntimeError if a CUDA driver is present; `what` names the CPU-only package in the message.

    Not ImportError: SGLang tries some imports and continues without them, which would hide the message.
    """
    if found := find_cuda_driver():
        raise RuntimeError(
            f"{what} is only for machines without an NVIDIA driver, and this one has one ({found}): "
            "run environment/setup.sh here, which installs the GPU packages instead"
        )


if __name__ == "__main__":
    driver = find_cuda_driver()
    if driver is None:
        sys.exit(1)
    print(driver)
