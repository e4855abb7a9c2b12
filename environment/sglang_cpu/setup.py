"""Refuses to be built where a CUDA driver is present; everything else is in pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import setup

# The package is not importable yet while it is being built, so the check is run from its file.
_driver_module = runpy.run_path(str(Path(__file__).parent / "src/minpro_sglang_cpu/cuda_driver.py"))
_driver_module["refuse_if_cuda_driver"]("minpro-sglang-cpu")

setup()
