"""Every setting with its default and its description, from the settings classes: what `minpro settings` prints."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from minpro_megatron.config.path_type import NamesPath
from minpro_megatron.config.run import RunConfig


@dataclass(frozen=True)
class Setting:
    """A setting by its name on the command line, `section.key`. `default` is JSON text; "" if it must be given."""

    path: str
    default: str
    description: str


def settings_of(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[Setting]:
    """Every setting of a section, in the order of its class. A section that its name selects, such as `objective`,
    comes once for each of its classes, without the repeated settings of the same default."""
    seen: set[Setting] = set()
    for path, field in fields_of(section, prefix):
        setting = Setting(path, _default(field), field.description or "")
        if setting not in seen:
            seen.add(setting)
            yield setting


def fields_of(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(section.key, field) of every setting; of a list of sections, such as evaluation.benchmarks, the list first."""
    for name, field in section.model_fields.items():
        inner = sections_in(field.annotation)
        if not inner or (field.annotation not in inner and field.discriminator is None):
            yield f"{prefix}{name}", field
        for one in inner:
            yield from fields_of(one, f"{prefix}{name}.")


@cache
def path_settings() -> dict[str, NamesPath]:
    """The settings that name a file or folder, section.key, with what their type says of it."""
    marks = {
        path: [mark for mark in field.metadata if isinstance(mark, NamesPath)] for path, field in fields_of(RunConfig)
    }
    return {path: found[0] for path, found in marks.items() if found}


def value_of(config: RunConfig, path: str) -> Any:
    """The value of the setting `section.key`. Raises KeyError if this run has no such setting, such as one of another
    objective."""
    value: Any = config.model_dump(mode="json")
    for key in path.split("."):
        if not isinstance(value, dict):
            raise KeyError(path)
        value = value[key]
    return value


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The settings classes that a field's annotation mentions, also within Annotated, unions and lists."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in get_args(annotation) for section in sections_in(argument)]


def _default(field: FieldInfo) -> str:
    return "" if field.is_required() else as_text(field.get_default(call_default_factory=True))


def as_text(value: Any) -> str:
    """The value as it is written on the command line."""
    return value if isinstance(value, str) and value else json.dumps(value, default=_plain)


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json")
