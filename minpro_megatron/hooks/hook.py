"""Functions of the user's that a setting names by import path, `package.module:function`.

docs/extending.md lists the settings, with the signature of each function.
"""

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from minpro_megatron.errors import WRONG_INPUT, ProjectError, UserError

_IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


class HookError(ProjectError):
    """A hook has returned something that its rule forbids; the message names the hook and the rule."""

    exit_status: ClassVar[int] = WRONG_INPUT  # a restart would fail in the same way


def is_import_path(text: str) -> bool:
    """Whether `text` has the form of an import path.

    >>> is_import_path("package.module:function"), is_import_path("package.module")
    (True, False)
    """
    return _IMPORT_PATH.fullmatch(text) is not None


@dataclass(frozen=True)
class Hook:
    """The function with import path `path`, which the setting `setting` names."""

    setting: str
    path: str

    def __str__(self) -> str:
        return f"{self.setting} = {self.path}"

    def load(self) -> Callable[..., Any]:
        """The function. Raises UserError, with the cause of a failed import, if there is none."""
        module, _, function = self.path.partition(":")
        try:
            found = getattr(importlib.import_module(module), function)
        except Exception as error:
            raise UserError(
                f"{self}: it cannot be loaded: {type(error).__name__}: {error}; the module must be importable from "
                "the folder in which the run is started"
            ) from error
        if not callable(found):
            raise UserError(f"{self}: it is not a function but of type {type(found).__name__}")
        return found

    def source_file(self) -> Path | None:
        """The file of the function's module, found without running any of its code; None if there is no file."""
        *packages, module = self.path.partition(":")[0].split(".")
        folders = [Path.cwd(), *map(Path, sys.path)]  # `python -m`, as every role is started, adds the current folder
        for name in packages:
            regular = [folder / name for folder in folders if (folder / name / "__init__.py").is_file()]
            folders = regular[:1] or [folder / name for folder in folders if (folder / name).is_dir()]
        files = (folder / file for folder in folders for file in (f"{module}/__init__.py", f"{module}.py"))
        return next((file for file in files if file.is_file()), None)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Context manager for a call of the function: an error in it keeps its traceback, which then also names the
        setting."""
        try:
            yield
        except Exception as error:
            error.add_note(f"This error was raised by the function of the setting {self}.")
            raise

    def error(self, problem: str) -> HookError:
        """The error of a result that is against the hook's rule."""
        return HookError(f"{self}: {problem}")
