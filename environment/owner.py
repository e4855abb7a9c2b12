"""Prints the checkout whose code the `minpro` of this environment runs; nothing if there is none, or if it was removed.

Standard library only, because set-up runs this file before it installs anything.
"""

import importlib.metadata
import json
import sys
import sysconfig
from pathlib import Path
from urllib.parse import unquote, urlsplit

NAME = "minpro-megatron"


def owner(packages: str) -> Path | None:
    """The checkout of the editable installation in the folder `packages`."""
    for found in importlib.metadata.distributions(name=NAME, path=[packages]):
        stated = json.loads(found.read_text("direct_url.json") or "{}")
        checkout = Path(unquote(urlsplit(stated.get("url", "")).path))
        if stated.get("dir_info", {}).get("editable") and (checkout / "pyproject.toml").is_file():
            return checkout
    return None


if __name__ == "__main__":
    if (checkout := owner(sysconfig.get_path("purelib"))) is None:
        sys.exit(1)
    print(checkout)
