"""Writes the reference pages of the documentation, docs/reference/, from the code: settings and metrics.

    python tools/write_reference.py            # write the pages
    python tools/write_reference.py --check    # exit with 1 if a page is not what the code gives

tests/unit/repository/test_reference.py makes the same check.
"""

import argparse
import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from minpro_megatron.config.run import RunConfig
from minpro_megatron.metrics.declared import metric_table

PAGES = ROOT / "docs" / "reference"
_NOTE = "<!-- Written by tools/write_reference.py from the code. Do not edit. -->\n"
_BOUNDS = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Le: ("le", "≤"), Lt: ("lt", "<")}
_ALTERNATIVES = re.compile(r"\^\(([a-z|]+)\)\$")  # a pattern that only lists words, such as ^(cpu|cuda)$


def settings_page() -> str:
    """docs/reference/settings.md: the sections of a run's settings, without those of `objective` and `loss`."""
    introduction = (
        "Every setting of a run, by section; those of `objective` and `loss` have [a page of their "
        "own](objective_settings.md). A setting is changed on the command line as `section.key=value`, where the "
        "value is JSON or plain text. A recipe sets it in the section's class, a class of `config/`. `run.json` in a "
        "run folder has the values of that run. A setting without a default must be given by the recipe."
    )
    chosen = (found for found in _sections(RunConfig) if not _is_of_loss(found[0]))
    return _page("Settings", introduction, chosen)


def objective_settings_page() -> str:
    """docs/reference/objective_settings.md: the sections `objective`, one table for each objective, and `loss`."""
    introduction = (
        "`objective.name` selects the objective, and with it the settings of the section `objective`. The settings of"
        " `loss` work with every objective. [objectives.md](../objectives.md) explains them."
    )
    chosen = (found for found in _sections(RunConfig) if _is_of_loss(found[0]))
    return _page("Settings of the objective and the loss", introduction, chosen)


def _is_of_loss(title: str) -> bool:
    return title.startswith(("objective", "loss"))


def _page(title: str, introduction: str, sections: Iterable[tuple[str, type[BaseModel]]]) -> str:
    lines = [_NOTE, f"# {title}", "", introduction, ""]
    for name, section in sections:
        lines += [f"## {name}", "", _docstring(section), ""]
        lines += ["| setting | default | allowed | meaning |", "|---|---|---|---|"]
        for key, field in section.model_fields.items():
            if not _sections_in(field.annotation) or get_origin(field.annotation) is list:
                lines.append(f"| `{key}` | {_default(field)} | {_allowed(field)} | {_cell(field.description or '')} |")
        lines.append("")
    return "\n".join(lines).rstrip("\n") + "\n"


def metrics_page() -> str:
    """docs/reference/metrics.md: the declared metrics."""
    introduction = (
        "TensorBoard and `metrics.jsonl` hold these scalars, merged exactly over ranks and micro-batches. A name that"
        " ends in `<...>` stands for a family of scalars. The reduction states how the values of ranks are merged; "
        "`derived` metrics are computed from merged ones."
    )
    return f"{_NOTE}\n# Metrics\n\n{introduction}\n\n{metric_table()}"


def pages() -> dict[Path, str]:
    """Every generated page and its text."""
    return {
        PAGES / "settings.md": settings_page(),
        PAGES / "objective_settings.md": objective_settings_page(),
        PAGES / "metrics.md": metrics_page(),
    }


def setting_names() -> set[str]:
    """The names of all settings and sections as the command line has them, such as `batch` and `batch.num_prompts`."""
    titles = [(title.partition(" ")[0], section) for title, section in _sections(RunConfig) if title != "The run"]
    inner = {f"{path}.{key}" for path, section in titles for key in section.model_fields}
    return {*RunConfig.model_fields, *(path for path, _ in titles), *inner}


def _sections(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """(title, class) of a section and the sections in it. A union, as of the objectives, gives one for each member."""
    if not prefix:
        yield "The run", section
    for name, field in section.model_fields.items():
        inner = _sections_in(field.annotation)
        for one in inner:
            path = f"{prefix}{name}"
            chosen = one.model_fields["name"].default if len(inner) > 1 else ""
            yield (f"{path} (name = {chosen})" if chosen else path), one
            yield from _sections(one, f"{path}.")


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The settings classes that a field's annotation mentions, also within Annotated, unions and lists."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _sections_in(argument)]


def _docstring(section: type[BaseModel]) -> str:
    return _cell(" ".join(inspect.cleandoc(section.__doc__ or "").split()))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    value = field.default
    return "`" + (value if isinstance(value, str) and value else json.dumps(value)).replace("|", "\\|") + "`"


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
    patterns = [bound.pattern for bound in field.metadata if getattr(bound, "pattern", None)]
    alternatives = _ALTERNATIVES.fullmatch(patterns[0]) if patterns else None
    return alternatives[1].split("|") if alternatives else []


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
    if _sections_in(annotation):
        return "objects, see below"
    if origin is Literal:
        return "names"
    known = [argument for argument in arguments if argument in names or get_origin(argument) is not None]
    return " or ".join(_type_name(argument) for argument in known) or "text"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the pages with the code instead of writing them")
    check = parser.parse_args().check
    old = [path for path, text in pages().items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in old:
        if check:
            print(f"{path.relative_to(ROOT)} is not what the code gives: run python tools/write_reference.py")
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(pages()[path], encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
    return 1 if check and old else 0


if __name__ == "__main__":
    sys.exit(main())
