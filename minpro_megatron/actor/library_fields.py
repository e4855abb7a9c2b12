"""The fields of Megatron-Core's dataclasses that the settings model.megatron, optimizer.megatron and parallel.ddp give.

They come from JSON: a torch dtype is written by its name ("bfloat16"), and so is a member of an enumeration.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from typing import Any, get_args, get_type_hints

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError

from minpro_megatron.command_line import did_you_mean
from minpro_megatron.errors import UserError


def field_values(kind: type, dictionary: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the setting `dictionary` for the fields of the dataclass `kind`.

    Raises UserError with a line for each name that is not a field, and for each value that is not of the field's type.
    """
    names = [field.name for field in fields(kind) if field.init]
    hints, found, problems = get_type_hints(kind), dict[str, Any](), list[str]()
    for name, value in given.items():
        if name not in names:
            hint = did_you_mean(name, names)
            problems.append(f"{dictionary}.{name}: Megatron-Core's {kind.__name__} has no such field{hint}")
            continue
        try:
            found[name] = _value(hints[name], value)
        except ValueError as error:
            problems.append(f"{dictionary}.{name} = {json.dumps(value)}: {error}")
    if problems:
        raise UserError(problems)
    return found


def _value(hint: Any, value: Any) -> Any:
    """`value` as a field annotated with `hint` holds it. Raises ValueError if it is not of this type."""
    for one in get_args(hint) or (hint,):
        if one is torch.dtype and isinstance(getattr(torch, str(value), None), torch.dtype):
            return getattr(torch, value)
        if isinstance(one, type) and issubclass(one, Enum) and value in one.__members__:
            return one[value]
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
        return adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        shown = getattr(hint, "__name__", "") if isinstance(hint, type) else str(hint).replace("typing.", "")
        raise ValueError(f"{error.errors()[0]['msg']}; the field's type is {shown}") from None
