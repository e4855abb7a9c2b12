"""What the machine of the checks has: GPU, driver, versions, and what is missing. Prints one JSON object.

    python -m minpro_megatron.gpu_checks.machine

A process of its own, because torch takes seconds to import and a broken installation can end the process.
"""

import importlib
import json
import platform
import subprocess
import sys
from importlib.util import find_spec

from minpro_megatron.launch.preflight.gpu_software import c_compiler
from minpro_megatron.monitor.environment import environment

# What the checks import of others' packages, and what they are needed for.
NEEDED = ("torch", "numpy", "megatron.core", "msgspec", "pydantic", "psutil")


def machine() -> dict[str, str]:
    """Facts by name; "missing" lists packages that cannot be imported, with the reason."""
    missing = [problem for name in NEEDED if (problem := _import_problem(name))]
    found = {"GPU": ""}
    if not any(problem.startswith("torch:") for problem in missing):
        import torch

        if torch.cuda.is_available():
            found["GPU"] = torch.cuda.get_device_name()
            found["GPU memory"] = f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.1f} GiB"
            found["driver"] = _driver()
            found["CUDA"] = str(torch.version.cuda)
            if c_compiler() is None:
                missing.append("a C compiler, which torch.compile needs: install gcc, or set CC")
    for name, value in environment().items():
        if name not in ("machine", "GPUs", "git commit"):
            found[name] = value
    found["Transformer Engine"] = "installed" if find_spec("transformer_engine") else "not installed"
    return found | ({"missing": "; ".join(missing)} if missing else {})


def _import_problem(name: str) -> str:
    try:
        importlib.import_module(name)
    except Exception as error:  # a broken installation raises anything
        return f"{name}: {' '.join(str(error).split())[:200]}"
    return ""


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.split("\n")[0].strip()


if __name__ == "__main__":
    json.dump(machine() | {"python": platform.python_version()}, sys.stdout)
