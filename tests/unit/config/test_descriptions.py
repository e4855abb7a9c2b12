"""Every setting describes itself: report.html shows the descriptions, and they are the reference of the settings."""

import pytest
from pydantic import BaseModel

from minpro_megatron.config.listing import fields_of, sections_in
from minpro_megatron.config.run import RunConfig


def all_sections(section: type[BaseModel]) -> set[type[BaseModel]]:
    inner = {found for field in section.model_fields.values() for found in sections_in(field.annotation)}
    return {section}.union(*map(all_sections, inner))


SETTINGS = list(fields_of(RunConfig))


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
