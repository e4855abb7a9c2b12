"""Checks that the functions which the settings name by import path can be loaded and return what they must."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache

from minpro_megatron.config.hooked import hooks_of
from minpro_megatron.config.run import RunConfig

TRIAL_MODULE = "minpro_megatron.launch.preflight.hook_trial"
TRIAL_TIMEOUT_S = 180.0
# The others have checks of their own: rewards are tried on rows of the run's files, an environment is made.
TRIED = ("objective.name", "loss.advantage", "data.filter")


def hook_problems(config: RunConfig) -> Iterator[str]:
    """One line for each hook that cannot be loaded, raises an error on a small input, or returns what its rule
    forbids. No code of the user runs in this process."""
    hooks = [hook for hook in hooks_of(config) if hook.setting in TRIED]
    if hooks:
        names = ", ".join(map(str, hooks))
        yield from _tried(names, config.to_json(), os.getcwd(), os.environ.get("PYTHONPATH", ""))


@cache  # importing torch takes seconds
def _tried(names: str, settings: str, folder: str, path: str) -> tuple[str, ...]:
    """The problems that the process of TRIAL_MODULE finds, in `folder` with PYTHONPATH `path`."""
    command = [sys.executable, "-m", TRIAL_MODULE]
    try:
        ended = subprocess.run(
            command, input=settings, capture_output=True, text=True, timeout=TRIAL_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return (f"{names}: not loaded and called within {TRIAL_TIMEOUT_S:g} s; what a module does at import must be "
                "short",)  # fmt: skip
    if ended.returncode:
        lines = ended.stderr.strip().splitlines() or ["without a message"]
        return (f"{names}: the process that tries them ended with exit code {ended.returncode} ({lines[-1]})",)
    return tuple(json.loads(ended.stdout))
