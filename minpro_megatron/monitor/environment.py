"""The environment of a run, as `run_dir/environment.json`: versions, machine, the code's commit."""

import json
import os
import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path

from minpro_megatron.files.json_files import read_json
from minpro_megatron.files.replacement import replace_file
from minpro_megatron.monitor.summary import installed_versions

FILE_NAME = "environment.json"
_ROOT = Path(__file__).resolve().parents[2]
_GIT_TIMEOUT_S = 10.0


def write_environment(run_dir: Path) -> None:
    """Writes the environment of this process. A run that resumes on another machine replaces the file."""
    replace_file(Path(run_dir) / FILE_NAME, json.dumps(environment(), indent=2) + "\n")


def read_environment(run_dir: Path) -> dict[str, str]:
    """The environment that the run has written, by name; empty if there is none."""
    return {str(name): str(value) for name, value in read_json(Path(run_dir) / FILE_NAME).items()}


def environment() -> dict[str, str]:
    """The environment of this process, by name."""
    found = {"machine": platform.node(), "system": platform.platform(), "processors": _processors()}
    if memory := _memory():
        found["memory"] = memory
    if gpus := _gpus():
        found["GPUs"] = gpus
    if commit := git_commit(_ROOT):
        found["git commit"] = commit
    return found | {"python": platform.python_version()} | installed_versions()


def _processors() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{usable} of {os.cpu_count()} {platform.machine()}"


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    except (ValueError, OSError):
        return ""


def _gpus() -> str:
    """The GPUs that this process sees; "" if it has not imported torch, which is not imported for this purpose."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return ""
    names = Counter(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return ", ".join(f"{count} x {name}" for name, count in names.items()) + f", CUDA {torch.version.cuda}"


def git_commit(root: Path) -> str:
    """The commit of the code in `root`, and whether files were changed since; "" if it is not a checkout."""
    if not (root / ".git").exists():  # else git would name the commit of a folder further up
        return ""
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return ""
    return commit + (f" and {len(changed.splitlines())} changed files" if changed else "")


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), "--no-optional-locks", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_GIT_TIMEOUT_S).stdout.strip()
