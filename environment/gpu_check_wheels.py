"""Collects the wheels that `minpro gpu-check` needs on a GPU machine without a network, besides that machine's torch.

    python environment/gpu_check_wheels.py [FOLDER]        # default: build/gpu_check_wheels

The versions are those of environment/constraints.txt; requirements.txt in the folder lists the names. The wheels are
for Python 3.12 on Linux x86-64. On the machine (docs/gpu_checks.md):

    python3 -m pip install --no-index --find-links FOLDER -r FOLDER/requirements.txt
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = ROOT / "build" / "gpu_check_wheels"
# What the checks import, and what these packages need in turn, without torch and what torch brings.
# typing-extensions comes with torch too, in a version that pydantic may find too old.
PACKAGES = (
    "annotated-types",
    "megatron-core",
    "msgspec",
    "numpy",
    "packaging",
    "psutil",
    "pydantic",
    "pydantic-core",
    "safetensors",
    "typing-extensions",
    "typing-inspection",
)
PYTHON = "3.12"
# The machine's glibc must be at least the newest of these.
PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_27_x86_64", "manylinux_2_28_x86_64")
MAX_BYTES = 64 * 2**20  # a checkout with its wheels should stay small enough to be copied to a machine for one command


def requirements(constraints: str) -> list[str]:
    """`name==version` of each package from the text of constraints.txt. Raises KeyError for one that is not pinned."""
    pins = dict(line.split("==") for line in constraints.splitlines() if "==" in line and not line.startswith("#"))
    return [f"{name}=={pins[name]}" for name in PACKAGES]


def main() -> int:
    """Writes the folder, and prints its wheels with their sizes."""
    folder = Path(sys.argv[1]) if sys.argv[1:] else DEFAULT
    folder.mkdir(parents=True, exist_ok=True)
    pinned = requirements((ROOT / "environment" / "constraints.txt").read_text(encoding="utf-8"))
    for old in folder.glob("*.whl"):
        old.unlink()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON, "--dest", str(folder)]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    subprocess.run([*command, *pinned], check=True)
    # without versions: what the machine has already may stay
    (folder / "requirements.txt").write_text("".join(f"{name}\n" for name in PACKAGES), encoding="utf-8")
    wheels = sorted(folder.glob("*.whl"))
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 1e6:7.2f} MB  {wheel.name}")
    total = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{total / 1e6:7.2f} MB  in {folder}")
    return 0 if len(wheels) == len(PACKAGES) and total < MAX_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
