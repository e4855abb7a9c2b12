"""The environment `python_tool`: runs the code in a turn, and gives the policy what it prints."""

import logging
from contextlib import AsyncExitStack
from typing import Protocol

from minpro_megatron.config.environment import PythonToolConfig
from minpro_megatron.environments.environment import Answer, EpisodeTurn
from minpro_megatron.environments.python_tool.calls import BadCall, tool_calls
from minpro_megatron.environments.python_tool.outcome import Outcome
from minpro_megatron.environments.python_tool.sandbox import Sandbox, SandboxFailed, check_isolation
from minpro_megatron.environments.python_tool.service import SandboxService

log = logging.getLogger(__name__)


class Runner(Protocol):
    async def run(self, code: str) -> Outcome: ...


class PythonTool:
    """Each call is a new process without memory of earlier ones, so an episode can be sampled again as a whole.

    Whatever goes wrong is text for the policy and a problem in the records, never an error: a policy that learns to
    break the tool must not be able to remove its groups from training. Use inside `async with`, which raises UserError
    if the code cannot be isolated.
    """

    def __init__(self, settings: PythonToolConfig) -> None:
        self._settings = settings
        self._stack = AsyncExitStack()
        self._runner: Runner | None = None

    async def __aenter__(self) -> "PythonTool":
        if self._settings.sandbox == "service":
            self._runner = await self._stack.enter_async_context(SandboxService(self._settings))
            return self
        check_isolation(self._settings)
        if self._settings.sandbox == "none":
            log.warning("environment.python_tool.sandbox = none: code of the policy runs with this user's rights")
        self._runner = self._stack.enter_context(Sandbox(self._settings))
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    async def answer(self, turn: EpisodeTurn) -> Answer | None:
        """The outcomes of the turn's calls; None if there is none."""
        calls = tool_calls(turn.text)[: self._settings.max_calls_per_turn]
        if not calls:
            return None
        outcomes = [await self._outcome(call) for call in calls]
        problems = [found.problem for found in outcomes if found.problem]
        return Answer("\n".join(found.text for found in outcomes), tool_calls=len(calls), problem="; ".join(problems))

    async def _outcome(self, call: str | BadCall) -> Outcome:
        assert self._runner is not None, "use `async with` around the tool"
        if isinstance(call, BadCall):
            return Outcome(f"error: {call}", str(call))
        try:
            return await self._runner.run(call)
        except SandboxFailed as error:
            log.warning("a tool call could not be run: %s", error)
            return Outcome("error: the tool is not available at this time", f"not run: {error}")
