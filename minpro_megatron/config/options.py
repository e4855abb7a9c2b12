"""Command-line options that are settings of a run under another name: their types, choices and descriptions are those
of the settings classes."""

import argparse
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from minpro_megatron.command_line import names
from minpro_megatron.config.listing import as_text
from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import ProjectError


@dataclass(frozen=True)
class SettingOption:
    """The option `flag` for the setting `section.key`. `default` replaces the setting's default for the command;
    `default_text` describes one that the command determines itself. `metavar` names the value in the help."""

    flag: str
    setting: str
    metavar: str | None = None
    default: Any = None
    default_text: str = ""

    @property
    def destination(self) -> str:
        """The option's name in the parsed arguments."""
        return self.flag.removeprefix("--").replace("-", "_")

    @property
    def value(self) -> Any:
        """The value if the option is not given; None if the command determines it."""
        if self.default is not None or self.default_text:
            return self.default
        return field_at(self.setting).get_default(call_default_factory=True)

    def add_to(self, parser: "argparse._ActionsContainer") -> None:
        """Adds the option. Its parsed value is None if it is not given."""
        field = field_at(self.setting)
        shown = self.default_text or ("none" if self.value in ([], {}, "") else as_text(self.value))
        text = f"{(field.description or '').rstrip('.')} (default: {shown})".replace("%", "%%")
        if field.annotation is bool:
            parser.add_argument(self.flag, action=argparse.BooleanOptionalAction, help=text)
            return
        parser.add_argument(
            self.flag,
            action="extend" if get_origin(field.annotation) is list else "store",  # may be repeated
            type=_type(field),
            choices=_choices(field),
            metavar=self.metavar,
            help=text,
            default=None,
        )


def field_at(setting: str) -> FieldInfo:
    """The declaration of the setting `section.key`."""
    section: Any = RunConfig
    *sections, key = setting.split(".")
    for name in sections:
        section = section.model_fields[name].annotation
    return section.model_fields[key]


def given_settings(options: Sequence[SettingOption], parsed: Mapping[str, Any]) -> dict[str, Any]:
    """By setting, the values of the options that were given."""
    return {
        option.setting: parsed[option.destination] for option in options if parsed.get(option.destination) is not None
    }


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} as {"a": {"b": 1}}, the form of a run's settings."""
    result: dict[str, Any] = {}
    for setting, value in values.items():
        *sections, key = setting.split(".")
        target = result
        for name in sections:
            target = target.setdefault(name, {})
        target[key] = value
    return result


def renamed_in(text: str, flags: Mapping[str, str]) -> str:
    """The message with the settings in it replaced by their flags: `section.key`, and at its beginning the form
    `section: key` of a rule of the whole section."""
    section, separator, rest = text.partition(": ")
    if separator and (flag := flags.get(f"{section}.{rest.partition(' ')[0]}")) is not None:
        text = f"{flag} {rest.partition(' ')[2]}"
    pattern = "|".join(re.escape(setting) for setting in sorted(flags, key=len, reverse=True))
    return re.sub(rf"(?<![\w.-])({pattern})(?![\w.]*\w)", lambda found: flags[found.group(1)], text)


@contextmanager
def naming(flags: Mapping[str, str]) -> Iterator[None]:
    """Errors that are raised inside name the flags of the command line in place of the settings of a run."""
    try:
        yield
    except ProjectError as error:
        raise with_flags(error, flags) from error


def with_flags(error: ProjectError, flags: Mapping[str, str]) -> ProjectError:
    """The same error with flags in place of settings in its message."""
    return type(error)([renamed_in(problem, flags) for problem in error.problems])


def _type(field: FieldInfo) -> Callable[[str], Any]:
    kinds = {int: int, float: float}
    for kind in (field.annotation, *get_args(field.annotation)):
        if kind in kinds:
            return kinds[kind]
    origin = get_origin(field.annotation)
    return names if origin is list else json_object if origin is dict else str


def _choices(field: FieldInfo) -> list[str] | None:
    return list(get_args(field.annotation)) if get_origin(field.annotation) is Literal else None


def json_object(text: str) -> dict[str, object]:
    """A JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r}: not a JSON object")
    return value
