"""The GPUs of this machine, as the driver shows them."""

import ctypes

_COMPUTE_MODE = 20  # CU_DEVICE_ATTRIBUTE_COMPUTE_MODE


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


def compute_modes() -> list[int]:
    """The compute mode of each GPU that the driver shows, as CUDA numbers them; 0 lets several processes use it."""
    modes = []
    for index in range(count_gpus()):
        driver, device, mode = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0), ctypes.c_int(0)
        if (
            driver.cuDeviceGet(ctypes.byref(device), index) == 0
            and driver.cuDeviceGetAttribute(ctypes.byref(mode), _COMPUTE_MODE, device) == 0
        ):
            modes.append(mode.value)
    return modes
