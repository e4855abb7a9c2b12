"""A run's settings for a page: by section, with the settings that are not the defaults."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from minpro_megatron.config.objective import ObjectiveConfig, ObjectiveSection
from minpro_megatron.config.run import RunConfig


class Setting(NamedTuple):
    """One setting; `default` is None if there is no default to compare with."""

    name: str  # such as batch.num_prompts
    value: Any
    default: Any
    description: str

    @property
    def is_changed(self) -> bool:
        """Whether the value differs from the default, or there is no default."""
        return self.value != self.default


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(section.key, value) of every setting of a run.json, in its order."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def described(settings: Mapping[str, Any]) -> dict[str, list[Setting]]:
    """The settings of a run.json by section; those without a section come first, as "run".

    The defaults are those of this version. If `settings` are of another version, settings that no longer exist have no
    default.
    """
    defaults, descriptions = dict(flat(defaults_for(settings))), dict(_descriptions(RunConfig, ""))
    if (objective := _chosen_objective(settings)) is not None:
        descriptions |= dict(_descriptions(type(objective), "objective."))
    sections: dict[str, list[Setting]] = {"run": []}
    for name, value in flat(settings):
        section = name.partition(".")[0] if "." in name else "run"
        # an entry of a dictionary, such as server.arguments.chunked_prefill_size, has the description of the dictionary
        description = descriptions.get(name) or descriptions.get(name.rpartition(".")[0], "")
        setting = Setting(name, value, defaults.get(name), description)
        sections.setdefault(section, []).append(setting)
    return {section: found for section, found in sections.items() if found}


def defaults_for(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults, in the form of a run.json, of a run with the objective of `settings`; settings without a
    default are missing."""
    found: dict[str, Any] = {}
    for name, field in RunConfig.model_fields.items():
        if not field.is_required():
            found[name] = to_jsonable_python(field.default)
        elif isinstance(kind := field.annotation, type) and issubclass(kind, BaseModel):
            own = {key: inner for key, inner in kind.model_fields.items() if not inner.is_required()}
            found[name] = {key: to_jsonable_python(inner.default) for key, inner in own.items()}
    if (chosen := _chosen_objective(settings)) is None:
        return found
    default_name = RunConfig.model_fields["objective"].default.name
    return found | {"objective": chosen.model_dump(mode="json") | {"name": default_name}}


def _chosen_objective(settings: Mapping[str, Any]) -> ObjectiveSection | None:
    """The defaults of the objective of `settings`; each objective has settings of its own. None if it is unknown."""
    objective = settings.get("objective")
    name = objective.get("name") if isinstance(objective, dict) else None
    try:
        return TypeAdapter(ObjectiveConfig).validate_python({"name": name})
    except ValidationError:
        return None


def _descriptions(kind: type[BaseModel], prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in kind.model_fields.items():
        if isinstance(inner := field.annotation, type) and issubclass(inner, BaseModel):
            yield from _descriptions(inner, f"{prefix}{name}.")
        elif field.description:
            yield f"{prefix}{name}", field.description
