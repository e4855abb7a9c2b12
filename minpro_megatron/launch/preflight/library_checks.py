"""Checks of the settings that are handed on to SGLang and Megatron-Core, by these libraries' own classes."""

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import UserError
from minpro_megatron.serving.server_command import server_command

_PORT = 30000  # any: ports have checks of their own


def server_argument_problems(config: RunConfig) -> Iterator[str]:
    """A line for each entry of server.arguments that SGLang does not accept."""
    arguments = config.server.arguments
    if not arguments:
        return
    try:
        command = server_command(config, 0, _PORT, 0)[3:]  # without the program
    except (UserError, OSError):  # the checks of the model report it
        return
    given = json.dumps({"arguments": arguments, "command": command})
    yield from _answer("minpro_megatron.serving.sglang_arguments", given, "server.arguments")


def megatron_field_problems(config: RunConfig) -> Iterator[str]:
    """A line for each field of model.megatron, optimizer.megatron and parallel.ddp that Megatron-Core does not accept,
    and for a dispatcher whose package is missing."""
    if config.parallel.dispatcher == "flex" and find_spec("deep_ep") is None:
        yield (
            "parallel.dispatcher = flex: the package deep_ep is not installed; install DeepEP, or set "
            "parallel.dispatcher to alltoall"
        )
    given = [config.model.megatron, config.optimizer.megatron, config.parallel.ddp]
    if any(given) and (Path(config.model.hf_path) / "config.json").is_file():
        text = config.to_json()
        yield from _answer(
            "minpro_megatron.actor.settings_check", text, "model.megatron, optimizer.megatron, parallel.ddp"
        )


def _answer(module: str, given: str, settings: str) -> list[str]:
    """The problems that the program `module` finds; one that names `settings` if it fails. A separate process, because
    importing either library takes seconds, and a broken installation can end the process."""
    command = [sys.executable, "-m", module]
    found = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    if found.returncode:
        reason = (found.stderr.strip().splitlines() or [f"exit code {found.returncode}"])[-1]
        return [f"{settings}: the library that reads them cannot check them ({reason}); correct its installation"]
    return json.loads(found.stdout.splitlines()[-1])
