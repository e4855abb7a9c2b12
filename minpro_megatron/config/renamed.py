"""The settings that were renamed.

Their old names keep working in recipes, overrides and run.json, and a line of the log gives the new names.
"""

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, Self

from pydantic import (
    ModelWrapValidatorHandler,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from minpro_megatron.config.base import Section
from minpro_megatron.errors import UserError

log = logging.getLogger(__name__)

_NEW_NAMES = {
    "collector.reward": "reward.function",
    "collector.reward_by_source": "reward.by_source",
    "collector.right_reward": "reward.right_reward",
    "collector.reward_timeout_s": "reward.timeout_s",
    "collector.reward_workers": "reward.workers",
}


def current_name(name: str) -> str:
    """The name of the setting today: `name`, or its new name if it was renamed.

    >>> current_name("collector.reward_by_source.gsm8k"), current_name("collector.port")
    ('reward.by_source.gsm8k', 'collector.port')
    """
    setting, entry = ".".join(name.split(".")[:2]), name.split(".")[2:]
    if setting not in _NEW_NAMES:
        return name
    _announce((setting,))
    return ".".join([_NEW_NAMES[setting], *entry])


def under_current_names(values: Mapping[str, Any], *, old_wins: bool = False) -> dict[str, Any]:
    """`values`, the settings of a run by section, with each renamed setting where it belongs today.

    Raises UserError if a setting is given under both names, unless `old_wins`: in a copy of complete settings every
    setting has a value under its new name, and one under its old name was put into the copy later.
    """
    moved, found = dict(values), []
    for old, new in _NEW_NAMES.items():
        (old_section, old_key), (section, key) = old.split("."), new.split(".")
        given = _as_dict(moved.get(old_section))
        if given is None or old_key not in given:
            continue
        target = _as_dict(moved.get(section, {}))
        if target is None:  # validation reports it
            continue
        if key in target and not old_wins:
            raise UserError(f"{old} and {new} are two names of one setting; remove {old}, the old one")
        found.append(old)
        moved[old_section] = {name: value for name, value in given.items() if name != old_key}
        moved[section] = target | {key: given[old_key]}
    if found:
        _announce(tuple(found))
    return moved


def _as_dict(section: Any) -> dict[str, Any] | None:
    if isinstance(section, Section):
        return section.model_dump(exclude_unset=True)
    return section if isinstance(section, dict) else None


@cache  # one line per process: settings are parsed several times
def _announce(found: tuple[str, ...]) -> None:
    pairs = ", ".join(f"{old} is now {_NEW_NAMES[old]}" for old in found)
    log.warning("renamed settings (the old names still work): %s", pairs)


class SectionWithRenamedSettings(Section):
    """A section that some settings have left. Recipes may still give them to it; RunConfig moves them on."""

    section_name: ClassVar[str]
    _renamed: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _accept_renamed(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        renamed, rest = cls._split(values) if isinstance(values, dict) else ({}, values)
        section = handler(rest)
        section._renamed.update(renamed)
        return section

    @model_serializer(mode="wrap")
    def _with_renamed(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return handler(self) | self._renamed

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        renamed, rest = self._split(update or {})
        copy = super().model_copy(update=rest, deep=deep)
        copy._renamed = self._renamed | renamed
        return copy

    @classmethod
    def _split(cls, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """(the settings in `values` that have left this section, the others)"""
        renamed = {name: value for name, value in values.items() if f"{cls.section_name}.{name}" in _NEW_NAMES}
        return renamed, {name: value for name, value in values.items() if name not in renamed}
