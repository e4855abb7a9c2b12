"""Where the recipes' models, data and runs are."""

from pathlib import Path

_PROJECT = Path(__file__).resolve().parent.parent
# In a checkout its folder `artifacts`, wherever a command is called; an installed package has no folder of its own to
# write to, so there it is `artifacts` in the current folder.
ARTIFACTS = (_PROJECT if (_PROJECT / "pyproject.toml").is_file() else Path.cwd()) / "artifacts"
# The prompt files that come with the project.
DATA = Path(__file__).resolve().parent / "data"
