"""The number of GPUs of this machine."""

import ctypes


def count_gpus() -> int:
    """The number of GPUs the driver shows, CUDA_VISIBLE_DEVICES considered; 0 without a working driver.

    It calls the driver directly, because importing torch would take seconds.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value
