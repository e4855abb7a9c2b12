"""Every setting describes itself: report.html shows the descriptions, and they are the reference of the settings."""

from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from minpro_megatron.config.run import RunConfig


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The settings sections that a field's annotation mentions, also within Annotated, unions and lists."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in get_args(annotation) for section in sections_in(argument)]


def settings_of(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(section.key, field) of every setting; a section is described by its docstring, a list of sections also here."""
    for name, field in section.model_fields.items():
        inner_sections = sections_in(field.annotation)
        for inner in inner_sections:
            yield from settings_of(inner, f"{prefix}{name}.")
        if not inner_sections or (field.annotation not in inner_sections and field.discriminator is None):
            yield f"{prefix}{name}", field


def all_sections(section: type[BaseModel]) -> set[type[BaseModel]]:
    inner = {found for field in section.model_fields.values() for found in sections_in(field.annotation)}
    return {section}.union(*map(all_sections, inner))


SETTINGS = list(settings_of(RunConfig))


def test_the_walk_finds_settings_of_every_depth():
    names = {name for name, _ in SETTINGS}
    assert {"seed", "batch.num_prompts", "loss.kl.enabled", "objective.dual_clip"} <= names
    assert {"evaluation.benchmarks", "evaluation.benchmarks.file"} <= names
    assert not {"batch", "objective", "loss.kl"} & names


def test_every_setting_is_described_in_full_sentences():
    described = {(name, field.description or "") for name, field in SETTINGS}
    wrong = sorted(name for name, text in described if not (text[:1].isupper() and text.endswith(".")))
    assert wrong == []


@pytest.mark.parametrize("section", sorted(all_sections(RunConfig), key=repr))
def test_every_section_has_a_docstring(section):
    assert (section.__doc__ or "").strip()
