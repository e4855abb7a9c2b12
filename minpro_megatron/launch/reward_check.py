"""Whether the graders that the settings name are there, asked of the very process that will grade."""

import subprocess
import sys
from collections.abc import Iterator

from minpro_megatron.config.run import RunConfig
from minpro_megatron.rewards.pool import MEMORY_LIMIT_BYTES, START_TIMEOUT_S, WORKER_MODULE
from minpro_megatron.rewards.registry import REWARDS, check_reward_name
from minpro_megatron.rewards.worker import LENGTH


def reward_problems(config: RunConfig) -> Iterator[str]:
    """A line for each setting whose reward is unknown, or has an import path that leads to no function."""
    settings = {"collector.reward": config.collector.reward}
    settings |= {
        f"collector.reward_by_source[{source!r}]": name for source, name in config.collector.reward_by_source.items()
    }
    refusals: dict[str, str] = {}  # by import path: each is tried once
    for field, name in settings.items():
        try:
            check_reward_name(name, field)
        except ValueError as error:
            yield str(error)
            continue
        if name not in REWARDS and name not in refusals:
            refusals[name] = _refusal(name)
        if refusals.get(name):
            yield f"{field} = {name!r}: {refusals[name]}"


def _refusal(name: str) -> str:
    """Why a grading process cannot load the reward; empty if it can. Nothing of the user's runs in this process."""
    command = [sys.executable, "-m", WORKER_MODULE, str(MEMORY_LIMIT_BYTES), "1", "10", name]
    try:
        ended = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=START_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"its module was not imported within {START_TIMEOUT_S:g} s; what it does at import must be short"
    if len(ended.stdout) >= LENGTH.size:
        return " ".join(ended.stdout[LENGTH.size :].decode(errors="replace").split())
    told = ended.stderr.decode(errors="replace").strip().splitlines() or ["without a word"]
    return f"its import ended the grading process with exit code {ended.returncode} ({told[-1]}); mend the module"
