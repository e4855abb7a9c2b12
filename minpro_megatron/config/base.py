"""The base of every settings section: immutable, without unknown fields, validated at construction."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A group of settings. Unknown fields are refused: a misspelt name must not become a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
