"""Write constraints.txt: every version installed in the environment this runs in.

    python environment/write_constraints.py [--gpu]

To change a version, install it into the virtual environment, run pytest there, then `make constraints`.
With --gpu, also writes constraints_gpu.txt: what the `train` and `serve` extras add, under those
pins. pip only resolves them, so this needs no GPU; it takes minutes. Needed after a change to either extra.
"""

import argparse
import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ENVIRONMENT = Path(__file__).resolve().parent
ROOT = ENVIRONMENT.parent
# Installed from this repository, so their version is the checkout's.
OWN_DISTRIBUTIONS = {"minpro-megatron", "minpro-sglang-cpu"}
HEADER = """\
# {what}
# Written by `{command}`; edit pyproject.toml, not this file.
"""


def canonical(name: str) -> str:
    """Return the distribution name as the package index spells it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_pins() -> dict[str, str]:
    """Return name -> version of everything installed here, pip included, this project excluded."""
    pins = {canonical(d.name): d.version for d in importlib.metadata.distributions()}
    return {name: version for name, version in pins.items() if name not in OWN_DISTRIBUTIONS}


def requirements(extras: list[str]) -> list[str]:
    """Return the project's own requirements with those of `extras`, as pyproject.toml states them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["dependencies"] + [r for e in extras for r in project["optional-dependencies"][e]]


def gpu_pins(shared: dict[str, str]) -> dict[str, str]:
    """Return what pip would install on a GPU machine under the `shared` pins, without what they already name."""
    with tempfile.TemporaryDirectory() as folder:
        report, constraints = Path(folder, "report.json"), Path(folder, "constraints.txt")
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in shared.items()))
        command = [sys.executable, "-m", "pip", "install", "-qq", "--dry-run", "--ignore-installed"]
        # Transformer Engine's torch extension needs torch to determine its own requirements.
        command += ["--no-build-isolation", "--report", str(report), "--constraint", str(constraints)]
        subprocess.run([*command, *requirements(["train", "serve", "cluster", "dev"])], check=True)
        found = [entry["metadata"] for entry in json.loads(report.read_text())["install"]]
    pins = {canonical(metadata["name"]): metadata["version"] for metadata in found}
    return {name: version for name, version in pins.items() if name not in shared}


def write(path: Path, pins: dict[str, str], *, what: str, command: str) -> None:
    lines = [f"{name}=={version}\n" for name, version in sorted(pins.items())]
    path.write_text(HEADER.format(what=what, command=command) + "".join(lines))
    print(f"{path.relative_to(ROOT)}: {len(lines)} versions")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the pinned versions of this environment.")
    parser.add_argument("--gpu", action="store_true", help="also write constraints_gpu.txt")
    arguments = parser.parse_args()
    shared = installed_pins()
    what = "Every version of the tested environment, direct and transitive."
    write(ENVIRONMENT / "constraints.txt", shared, what=what, command="make constraints")
    if arguments.gpu:
        what = "What GPU machines have in addition to constraints.txt: resolved together with it."
        pins = gpu_pins(shared)
        write(ENVIRONMENT / "constraints_gpu.txt", pins, what=what, command="make constraints ARGS=--gpu")


if __name__ == "__main__":
    main()
