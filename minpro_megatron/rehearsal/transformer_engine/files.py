"""Where the Python files of Transformer Engine are.

They are a wheel of 1 MB: `transformer-engine` without `transformer-engine-cu13` and `transformer-engine-torch`. It must
not be installed into the environment of a machine without a GPU, because there the package raises an error when it is
imported, where Megatron expects the package or an ImportError. So it is in a folder of its own.
"""

import os
import sys
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

from minpro_megatron.errors import UserError

PACKAGE = "transformer_engine"
VERSION = "2.20.2"  # whose compiled functions kernels.py has
VARIABLE = "MINPRO_TRANSFORMER_ENGINE"
FOLDER = Path("share", "transformer_engine_python")  # in the virtual environment; the Makefile fills it


def find_folder() -> Path:
    """The folder with the package's Python files: that which MINPRO_TRANSFORMER_ENGINE names, else that of `make
    transformer-engine-python`, else that of the installed package. Raises UserError."""
    given = os.environ.get(VARIABLE)
    candidates = [Path(given)] if given else [Path(sys.prefix, FOLDER)]
    installed = None if given else find_spec(PACKAGE)
    if installed is not None and installed.origin is not None:
        candidates.append(Path(installed.origin).parents[1])
    for folder in candidates:
        if Path(folder, PACKAGE, "pytorch", "__init__.py").is_file():
            found = _version_in(folder)
            if found != VERSION:
                raise UserError(
                    f"rehearse: {folder} has Transformer Engine {found}, and the shapes of its compiled functions are "
                    f"known for {VERSION}; {_remedy()}"
                )
            return folder
    where = f"{VARIABLE} = {given} has" if given else "this machine has"
    raise UserError(f"rehearse: {where} no Python files of Transformer Engine {VERSION}; {_remedy()}")


def _remedy() -> str:
    return (
        "fetch them (1 MB) with `make transformer-engine-python`, or with `pip install --no-deps --target FOLDER "
        f"transformer-engine=={VERSION}` and {VARIABLE}=FOLDER"
    )


def _version_in(folder: Path) -> str:
    """The version of the package in the folder, by its metadata; "unknown" without any."""
    versions = {found.name.replace("-", "_"): found.version for found in distributions(path=[str(folder)])}
    return versions.get(PACKAGE, "unknown")
