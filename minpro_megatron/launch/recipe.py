"""Converts the command line to validated settings."""

import importlib
import importlib.util
import inspect
import json
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from minpro_megatron.command_line import did_you_mean
from minpro_megatron.config.base import Section
from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.errors import UserError

BUNDLED = "minpro_megatron"  # the package that has the project's recipes: recipes.demo is minpro_megatron.recipes.demo
RECIPES = "recipes"
_PROJECT = Path(__file__).resolve().parents[2]


def load_recipe(recipe: str) -> RunConfig:
    """The settings that the recipe `module:function` returns. Raises UserError if it does not."""
    module_name, separator, function_name = recipe.rpartition(":")
    if not (separator and module_name and function_name):
        raise UserError(
            f"recipe {recipe!r}: expected module:function, such as recipes.demo:tiny_moe, or ./file.py:function"
        )
    module = _import(module_name, f"recipe {recipe!r}")
    recipes = _recipes_in(module)
    function = recipes.get(function_name, getattr(module, function_name, None))
    if not callable(function):
        hint = did_you_mean(function_name, recipes)
        known = ", ".join(recipes) or "no recipe"
        raise UserError(f"recipe {recipe!r}: {module_name} has no function {function_name!r}{hint}; it has: {known}")
    return _call(recipe, function)


def list_recipes(name: str) -> list[str]:
    """A line for each recipe of the module `name`, or of the modules in the package of this name: its name for `launch`
    and the first line of its docstring. Raises UserError for a name that cannot be imported."""
    module = _import(name, f"recipes of {name!r}")
    inside = {found.name for found in pkgutil.iter_modules(getattr(module, "__path__", []), f"{name}.")}
    if name == RECIPES:  # the user's, and those of this project that they do not replace
        inside.update(_bundled_names())
    modules = {one: _import(one, f"recipes of {name!r}") for one in sorted(inside)}
    found = [
        (f"{called}:{function_name}", (inspect.getdoc(function) or "").partition("\n")[0])
        for called, one in {name: module, **modules}.items()
        for function_name, function in _recipes_in(one).items()
    ]
    if not found:
        raise UserError(f"recipes of {name!r}: it contains no recipe, that is no public function without parameters")
    width = max(len(recipe) for recipe, _ in found)
    return [f"{recipe:{width}}  {purpose}".rstrip() for recipe, purpose in found]


def _import(module_name: str, what: str) -> ModuleType:
    """The module of this name, or in the file of this name. Raises UserError for whatever its import raises."""
    try:
        if module_name.endswith(".py"):
            return _import_file(Path(module_name))
        return importlib.import_module(_full_name(module_name))
    except FileNotFoundError as error:
        if Path(str(error.filename)) != Path(module_name):
            raise UserError(f"{what}: importing {module_name} failed: {_named(error)}") from error
        raise UserError(f"{what}: there is no file {module_name}") from None
    except ModuleNotFoundError as error:
        wanted = f"{BUNDLED}.{module_name}" if (error.name or "").startswith(f"{BUNDLED}.") else module_name
        if error.name and (wanted == error.name or wanted.startswith(f"{error.name}.")):
            missing = error.name.removeprefix(f"{BUNDLED}.")
            hint = did_you_mean(missing, [*_own_names(), *_bundled_names()])
            raise UserError(
                f"{what}: there is no module {missing!r}{hint}; run from the folder that contains it"
            ) from None
        raise UserError(f"{what}: importing {module_name} failed: {_named(error)}") from error
    except Exception as error:  # a recipe file is the user's: every error in it is reported in one line
        raise UserError(f"{what}: importing {module_name} failed: {_named(error)}") from error


def _full_name(name: str) -> str:
    """The importable name of a module. `recipes` and what is in it are the user's, if the current folder or PYTHONPATH
    has such a module, else this project's, wherever a command is called."""
    if name.partition(".")[0] != RECIPES:
        return name
    own = _own_spec(name)
    if own is None:
        return f"{BUNDLED}.{name}"
    if name in _bundled_names():
        place = own.origin or ", ".join(own.submodule_search_locations or ())
        print(f"note: {name} is {place}; this project's is {BUNDLED}.{name}", file=sys.stderr)
    _use_own_recipes()
    return name


def _own_spec(name: str) -> ModuleSpec | None:
    """Where the user's module `recipes` or `recipes.NAME` is; None if there is none.

    A folder of this name needs no __init__.py. The import system would prefer this project's package to such a folder
    where the root of a checkout is on the path, as it is after an editable installation.
    """
    places: list[str] | None = _own_places()
    found = None
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        found = PathFinder.find_spec(".".join(parts[:length]), places)
        if found is None:
            return None
        places = list(found.submodule_search_locations or ())
    return found


def _own_places() -> list[str]:
    """The folders that may hold the user's recipes: the current one, and what is on the path before this project."""
    entries = [Path(entry).resolve() for entry in [os.getcwd(), *sys.path]]
    before = entries[: entries.index(_PROJECT)] if _PROJECT in entries else entries
    return [str(entry) for entry in before]


def _use_own_recipes() -> None:
    """Makes `recipes` the user's package for this process, so that its modules can import each other."""
    spec = _own_spec(RECIPES)
    assert spec is not None  # a module in it has been found
    loaded = sys.modules.get(RECIPES)
    if loaded is not None and getattr(loaded, "__spec__", None) == spec:
        return
    for name in [name for name in sys.modules if name.partition(".")[0] == RECIPES]:
        del sys.modules[name]
    module = importlib.util.module_from_spec(spec)
    sys.modules[RECIPES] = module
    if spec.loader is not None:
        spec.loader.exec_module(module)


def _own_names() -> list[str]:
    own = _own_spec(RECIPES)
    places = own.submodule_search_locations if own is not None else None
    return [found.name for found in pkgutil.iter_modules(places or [], f"{RECIPES}.")]


def _bundled_names() -> list[str]:
    package = importlib.import_module(f"{BUNDLED}.{RECIPES}")
    return [found.name for found in pkgutil.iter_modules(package.__path__, f"{RECIPES}.")]


def _import_file(path: Path) -> ModuleType:
    """The module in a file that may be anywhere; it can import the modules beside it."""
    path.stat()  # raises FileNotFoundError with this name
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # every .py file has a loader
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    """`config` with the command line's `section.key=value` applied. Raises UserError with one line per problem."""
    return with_overrides(config, assignments)


def read_config(path: Path, option: str = "--config") -> RunConfig:
    """The settings in a run.json, which `option` names, or whose folder it names. Raises UserError with one line per
    problem."""
    remedy = "give the run.json of a run" if option == "--config" else "give the folder of a run"
    try:
        return RunConfig.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}; {remedy}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{option} {path}: not JSON ({error}); {remedy}") from None
    except UserError as error:
        raise UserError(f"{option} {path}: {problem}" for problem in error.problems) from None


def _named(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def _given(entry: Any) -> str:
    return "" if isinstance(entry["input"], dict | Section) else f" (got {entry['input']!r})"


def _recipes_in(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """By name: the module's public functions without parameters, and the functions in its mapping VARIANTS."""
    own = {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__ == module.__name__
        and not name.startswith("_")
        and not inspect.signature(value).parameters
    }
    return own | getattr(module, "VARIANTS", {})
