"""The values of a model's config.json, with their types checked."""

import math
from typing import Any

from minpro_megatron.errors import UserError


class ConfigFields:
    """The values of a config.json, with their types checked. Raises KeyError for a missing value, and ValueError with
    the file's name for a value of another type or far outside any model's range."""

    def __init__(self, config: dict[str, Any], where: str) -> None:
        self._config, self.where = config, where

    def has(self, field: str) -> bool:
        return self._config.get(field) is not None

    def size(self, field: str, largest: int = 1 << 24, least: int = 1, absent: int | None = None) -> int:
        """A count: an integer from `least` to `largest`. Sizes decide how much is allocated, so damage must be found
        here. `absent`: what transformers takes for a missing one; None if it must be given."""
        value = self._config[field] if absent is None or self.has(field) else absent
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= largest:
            raise UserError(f"{self.where}: {field} = {value!r} must be an integer from {least} to {largest}")
        return value

    def number(self, field: str, absent: float | None = None) -> float:
        """A finite number above 0. `absent`: as in `size`."""
        value = self._config[field] if absent is None or self.has(field) else absent
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise UserError(f"{self.where}: {field} = {value!r} must be a number above 0")
        return float(value)

    def switch(self, field: str) -> bool:
        """true or false; absent is false, as in transformers."""
        value = self._config.get(field)
        if not isinstance(value, bool | None):
            raise UserError(f"{self.where}: {field} = {value!r} must be true or false")
        return bool(value)

    def text(self, field: str, absent: str) -> str:
        value = self._config.get(field)
        if not isinstance(value, str | None):
            raise UserError(f"{self.where}: {field} = {value!r} must be a text")
        return absent if value is None else value

    def within(self, field: str) -> "ConfigFields":
        """The fields of an object in the config."""
        value = self._config.get(field) or {}
        if not isinstance(value, dict):
            raise UserError(f"{self.where}: {field} = {value!r} must be an object")
        return ConfigFields(value, f"{self.where}: {field}")

    def only(self, field: str, absent: Any, supported: Any) -> None:
        """Raises UserError unless the value is `supported`; `absent` is what transformers takes for a missing one."""
        value = absent if self._config.get(field) is None else self._config[field]
        if value != supported:
            raise UserError(f"{self.where}: {field} = {value!r} is not supported; only {supported!r} is")
