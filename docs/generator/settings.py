"""The reference pages of the settings, from the settings classes."""

import inspect
import json
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from docs.generator.markdown import cell
from minpro_megatron.config.listing import as_text, sections_in
from minpro_megatron.config.run import RunConfig

_BOUNDS = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Le: ("le", "≤"), Lt: ("lt", "<")}


def settings_page() -> str:
    """docs/reference/settings.md: the sections of a run's settings that have no page of their own."""
    introduction = (
        "Every setting of a run, by section; those of `objective`, `loss` and `environment` have pages of their own, "
        "[objective_settings.md](objective_settings.md), [loss_settings.md](loss_settings.md) and "
        "[environment_settings.md](environment_settings.md). A setting is changed "
        "on the command line as `section.key=value`, where the value is JSON or plain text. A recipe sets it in the "
        "section's class, a class of `config/`. `run.json` in a run folder has the values of that run. A setting "
        "without a default must be given by the recipe."
    )
    elsewhere = ("objective", "loss", "environment")
    return _page(introduction, (found for found in _sections(RunConfig) if not found[0].startswith(elsewhere)))


def objective_settings_page() -> str:
    """docs/reference/objective_settings.md: the section `objective`, one table for each objective."""
    introduction = (
        "`objective.name` selects the objective, and with it the settings of the section `objective`. "
        "[objectives.md](../objectives.md) explains them."
    )
    return _page(introduction, (found for found in _sections(RunConfig) if found[0].startswith("objective")))


def loss_settings_page() -> str:
    """docs/reference/loss_settings.md: the section `loss`."""
    introduction = (
        "The settings of `loss` work with every objective. [objectives.md](../objectives.md#corrections-and-penalties) "
        "explains them."
    )
    return _page(introduction, (found for found in _sections(RunConfig) if found[0].startswith("loss")))


def environment_settings_page() -> str:
    """docs/reference/environment_settings.md: the section `environment`."""
    introduction = "The settings of `environment`. [episodes.md](../episodes.md) explains them."
    return _page(introduction, (found for found in _sections(RunConfig) if found[0].startswith("environment")))


def _page(introduction: str, sections: Iterable[tuple[str, type[BaseModel]]]) -> str:
    lines = [introduction, ""]
    for name, section in sections:
        lines += [f"## {name}", "", _docstring(section), ""]
        lines += ["| setting | default | allowed | meaning |", "|---|---|---|---|"]
        for key, field in section.model_fields.items():
            if not sections_in(field.annotation) or get_origin(field.annotation) is list:
                lines.append(f"| `{key}` | {_default(field)} | {_allowed(field)} | {cell(field.description or '')} |")
        lines.append("")
    return "\n".join(lines).rstrip("\n") + "\n"


def _sections(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """(title, class) of a section and the sections in it. A union, as of the objectives, gives one for each member."""
    if not prefix:
        yield "The run", section
    for name, field in section.model_fields.items():
        inner = sections_in(field.annotation)
        for one in inner:
            path = f"{prefix}{name}"
            chosen = one.model_fields["name"].default if len(inner) > 1 else ""
            yield (f"{path} (name = {chosen})" if chosen else path), one
            yield from _sections(one, f"{path}.")


def _docstring(section: type[BaseModel]) -> str:
    return cell(" ".join(inspect.cleandoc(section.__doc__ or "").split()))


def _default(field: FieldInfo) -> str:
    return "" if field.is_required() else f"`{as_text(field.default)}`"


def _allowed(field: FieldInfo) -> str:
    """The choices of a value, or its type and bounds."""
    choices = _choices(field)
    if choices:
        return ", ".join(f"`{one if isinstance(one, str) else json.dumps(one)}`" for one in choices)
    bounds = [
        f"{sign} {getattr(bound, attribute)}"
        for bound in field.metadata
        for kind, (attribute, sign) in _BOUNDS.items()
        if isinstance(bound, kind)
    ]
    name, or_null, _ = _type_name(field.annotation).partition(" or null")
    return " ".join([name, ", ".join(bounds)]).strip() + or_null


def _choices(field: FieldInfo) -> list[Any]:
    if field.annotation is bool:
        return [True, False]
    if get_origin(field.annotation) is Literal:
        return list(get_args(field.annotation))
    return []


def _type_name(annotation: Any) -> str:
    """The type in words, such as `integer`, `number or null`, `list of text`."""
    names = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
    if annotation in names:
        return names[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (list, tuple):
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return f"object of {_type_name(arguments[1])}"
    if sections_in(annotation):
        return "objects, see below"
    if origin is Literal:
        return "names"
    known = [argument for argument in arguments if argument in names or get_origin(argument) is not None]
    return " or ".join(_type_name(argument) for argument in known) or "text"
