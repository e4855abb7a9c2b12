"""From what stands on the command line to validated settings."""

import importlib
import inspect
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from minpro_megatron.config.base import Section
from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.launch.user_error import UserError


def load_recipe(recipe: str) -> RunConfig:
    """The settings that the recipe `module:function` returns. Raises UserError if it does not."""
    module_name, separator, function_name = recipe.partition(":")
    if not (separator and module_name and function_name):
        raise UserError(f"recipe {recipe!r}: expected module:function, such as recipes.demo:tiny_moe")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise UserError(
                f"recipe {recipe!r}: there is no module {error.name!r}; run from the folder that contains it"
            ) from None
        raise UserError(f"recipe {recipe!r}: importing {module_name} failed: {_named(error)}") from error
    except Exception as error:  # a recipe file is the user's: whatever it raises is told in one line
        raise UserError(f"recipe {recipe!r}: importing {module_name} failed: {_named(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [name for name, value in vars(module).items() if _is_recipe(value, module_name)]
        raise UserError(
            f"recipe {recipe!r}: {module_name} has no function {function_name!r}; it has: {', '.join(known)}"
        )
    return _call(recipe, function)


def _call(recipe: str, function: Callable[[], object]) -> RunConfig:
    try:
        config = function()
    except ValidationError as error:
        raise UserError(
            f"recipe {recipe!r}: {'.'.join(map(str, entry['loc'])) or 'run'}: {entry['msg']}{_given(entry)}"
            for entry in error.errors()
        ) from error
    except Exception as error:
        raise UserError(f"recipe {recipe!r}: it failed: {_named(error)}") from error
    if not isinstance(config, RunConfig):
        raise UserError(f"recipe {recipe!r}: it returned {type(config).__name__}; it must return a RunConfig")
    return config


def apply_overrides(config: RunConfig, assignments: list[str]) -> RunConfig:
    """`config` with the command line's `section.key=value` applied. Raises UserError, one line a problem."""
    try:
        return with_overrides(config, assignments)
    except ValueError as error:
        raise UserError(str(error).splitlines()) from None


def read_config(path: Path) -> RunConfig:
    """The settings in a run.json. Raises UserError, one line a problem."""
    try:
        return RunConfig.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; give the run.json of a run") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not JSON ({error}); give the run.json of a run") from None
    except ValueError as error:
        raise UserError(f"--config {path}: {problem}" for problem in str(error).splitlines()) from None


def _named(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def _given(entry: Any) -> str:
    return "" if isinstance(entry["input"], dict | Section) else f" (got {entry['input']!r})"


def _is_recipe(value: object, module_name: str) -> bool:
    return inspect.isfunction(value) and value.__module__ == module_name and not value.__name__.startswith("_")
