"""The run's paths as the job's nodes see them."""

from pathlib import Path, PurePosixPath
from typing import Any

from minpro_megatron.config.run import RunConfig

_PROJECT = Path(__file__).resolve().parent.parent
# The checkout; for an installed package the current folder, because relative paths of settings refer to it.
CHECKOUT = _PROJECT if (_PROJECT / "pyproject.toml").is_file() else Path.cwd()
# Every setting that names a file or folder, except the files of evaluation.benchmarks.
_SETTINGS = (
    ("runs_dir",), ("model", "hf_path"), ("model", "megatron_path"), ("data", "train_file"), ("data", "heldout_file"),
    ("debug", "journal"),
)  # fmt: skip


def in_workspace(config: RunConfig, workspace: str, checkout: Path = CHECKOUT) -> RunConfig:
    """`config` with relative paths, and paths inside this checkout, moved to the cluster's workspace."""
    values = config.model_dump()
    for *sections, key in _SETTINGS:
        target: dict[str, Any] = values
        for section in sections:
            target = target[section]
        target[key] = path_in_workspace(target[key], workspace, checkout)
    for benchmark in values["evaluation"]["benchmarks"]:
        benchmark["file"] = path_in_workspace(benchmark["file"], workspace, checkout)
    return RunConfig.model_validate(values)


def path_in_workspace(path: str, workspace: str, checkout: Path) -> str:
    """The location of `path` on the cluster; "" is unchanged."""
    if not path:
        return path
    given = Path(path)
    if given.is_absolute() and not given.is_relative_to(checkout):
        return path
    inside = given.relative_to(checkout) if given.is_absolute() else given
    return str(PurePosixPath(workspace) / inside.as_posix())
