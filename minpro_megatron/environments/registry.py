"""Environments by name or import path, for `environment.name`."""

from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import cast

from minpro_megatron.config.environment import PYTHON_TOOL, EnvironmentConfig
from minpro_megatron.environments.environment import Environment
from minpro_megatron.environments.python_tool.tool import PythonTool
from minpro_megatron.errors import UserError
from minpro_megatron.hooks.hook import Hook, is_import_path

SETTING = "environment.name"


def make_environment(settings: EnvironmentConfig) -> Environment:
    """The environment that the settings name. Raises UserError if there is none, or if it cannot be made."""
    if settings.name == PYTHON_TOOL:
        return PythonTool(settings.python_tool)
    if not is_import_path(settings.name):
        raise UserError(
            f"{SETTING} = {settings.name!r}: there is no such environment; known: none, {PYTHON_TOOL}, or the import "
            "path of your own class, such as package.module:Class"
        )
    hook = Hook(SETTING, settings.name)
    with hook.running():
        made = hook.load()()
    if not callable(getattr(made, "answer", None)):
        raise UserError(f"{hook}: it has no method `answer`; see docs/episodes.md for what an environment is")
    return cast(Environment, made)


async def opened(environment: Environment, stack: AsyncExitStack) -> Environment:
    """The environment after it has been entered, if it is a context manager; `stack` leaves it."""
    if isinstance(environment, AbstractAsyncContextManager):
        return await stack.enter_async_context(environment)
    return environment
