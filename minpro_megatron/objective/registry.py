"""The objectives by name; chosen once, when the policy is built."""

from collections.abc import Callable
from typing import Any

from minpro_megatron.objective.clipped import grpo
from minpro_megatron.objective.terms import ObjectiveTerms, PolicyTokens
from minpro_megatron.objective.weighted import cispo, minpro

Objective = Callable[[PolicyTokens, Any], ObjectiveTerms]

OBJECTIVES: dict[str, Objective] = {
    "minpro": minpro,
    "cispo": cispo,
    "grpo": grpo,
}
