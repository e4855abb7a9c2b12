"""Stand-in for the CUDA-only package `sgl_kernel` on machines without an NVIDIA driver.

SGLang's CPU engine imports names from sgl_kernel when its modules load, and then, on processors without AMX,
computes everything with plain torch. So every name can be imported here and calling one raises.
"""

from collections.abc import Callable
from typing import Any, NoReturn

from minpro_sglang_cpu.cuda_driver import refuse_if_cuda_driver

refuse_if_cuda_driver("the stand-in sgl_kernel")

# SGLang reports the version with its environment; the suffix distinguishes this package.
__version__ = "0.0.0+no.cuda.driver"


def __getattr__(name: str) -> Callable[..., NoReturn]:
    # The import system and inspect ask for these, and would use any result.
    if name.startswith("__"):
        raise AttributeError(f"module 'sgl_kernel' has no attribute {name!r}")

    def missing_op(*_args: Any, **_kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"sgl_kernel.{name} needs an NVIDIA GPU: this is the stand-in for machines without a driver. "
            "Start the server with --device cpu --attention-backend torch_native --sampling-backend pytorch"
        )

    missing_op.__name__ = missing_op.__qualname__ = name
    return missing_op
