"""The rules of data.demonstrations: what supervised fine-tuning needs, and the settings that mean nothing in it."""

from operator import attrgetter
from typing import Any

from minpro_megatron.config.base import Section

# The settings that are about sampled responses, their prompts and their rewards, and the values that switch them off.
OF_SAMPLED_RESPONSES: dict[str, Any] = {
    "staleness.mode": "delay",
    "staleness.delay_steps": 0,
    "staleness.behavior_log_probs": "trainer",
    "sampling.temperature": 1.0,
    "sampling.top_k": 0,
    "batch.dynamic_sampling": False,
    "data.filter": "",
    "data.source_weights": {},
    "data.min_pass_rate": 0,
    "data.max_pass_rate": 1,
    "data.curriculum": "none",
    "model.routing_replay": "none",
    "loss.advantage": "group_normalized",
    "loss.equal_reward_groups": "keep",
    "optimizer.scale_by_effective_sample_size": False,
    "environment.name": "none",
    "evaluation.every_steps": 0,
    "evaluation.benchmarks": [],
    "server.placement": "disaggregated",
    "debug.journal": "",
    "debug.trainer": "megatron",
}


def refuse_contradicting_demonstrations(config: Section) -> None:
    """Raises ValueError if objective or group size do not fit data.demonstrations, or their absence, and for a setting
    that the run would ignore because it samples no responses. `config`: the settings of a whole run."""
    given, objective, size, loss = attrgetter(
        "data.demonstrations", "objective.name", "batch.responses_per_prompt", "loss"
    )(config)
    if bool(given) != (objective == "sft"):
        raise ValueError(
            f"data.demonstrations = {given!r} with objective.name = {objective}: sft is the objective of "
            "runs on demonstrations, and of no others; set both or neither"
        )
    if not given:
        if size < 2:
            raise ValueError(
                f"batch.responses_per_prompt = {size} must be at least 2: advantages are computed within the group"
            )
        return
    if size != 1:
        raise ValueError(
            f"batch.responses_per_prompt = {size} with data.demonstrations: a demonstration is one response; set it to "
            "1"
        )
    corrections = [name for name, section in loss if getattr(section, "enabled", False)]
    needed = OF_SAMPLED_RESPONSES | {f"loss.{name}.enabled": False for name in corrections}
    for name, off in needed.items():
        if (value := attrgetter(name)(config)) != off:
            raise ValueError(
                f"{name} = {value} with data.demonstrations: it is about sampled responses, and there are none; set "
                f"it to {off}"
            )
