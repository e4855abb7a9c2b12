"""The run's paths as the job's nodes see them."""

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from minpro_megatron.config.listing import path_settings
from minpro_megatron.config.run import RunConfig

_PROJECT = Path(__file__).resolve().parent.parent
# The checkout; for an installed package the current folder, because relative paths of settings refer to it.
CHECKOUT = _PROJECT if (_PROJECT / "pyproject.toml").is_file() else Path.cwd()


def in_workspace(config: RunConfig, workspace: str, checkout: Path = CHECKOUT) -> RunConfig:
    """`config` with relative paths, and paths inside this checkout, moved to the cluster's workspace."""
    values = config.model_dump()
    for setting in path_settings():
        _replace(values, setting.split("."), lambda path: path_in_workspace(path, workspace, checkout))
    return RunConfig.model_validate(values)


def _replace(values: Any, keys: list[str], new: Callable[[str], str]) -> None:
    """Replaces the setting at `keys` of nested dictionaries; of a list of sections, that of each section."""
    if isinstance(values, list):
        for section in values:
            _replace(section, keys, new)
    elif len(keys) > 1:
        _replace(values[keys[0]], keys[1:], new)
    else:
        values[keys[0]] = new(values[keys[0]])


def path_in_workspace(path: str, workspace: str, checkout: Path) -> str:
    """The location of `path` on the cluster; "" is unchanged."""
    if not path:
        return path
    given = Path(path)
    if given.is_absolute() and not given.is_relative_to(checkout):
        return path
    inside = given.relative_to(checkout) if given.is_absolute() else given
    return str(PurePosixPath(workspace) / inside.as_posix())
