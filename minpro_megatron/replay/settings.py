"""Converts the options of a replay to validated run settings."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minpro_megatron.batching.shards import row_multiple
from minpro_megatron.config.mesh_option import FLAGS as MESH_FLAGS
from minpro_megatron.config.mesh_option import parse_parallel
from minpro_megatron.config.options import SettingOption, naming
from minpro_megatron.config.run import RunConfig, parse_run_config, with_overrides
from minpro_megatron.errors import UserError
from minpro_megatron.replay.sampling_run import with_sampling_of_run

ROW_TOKENS = 4096  # of a packed row, unless a sequence is longer
ROW_TOKENS_SETTING = "batch.max_tokens_per_row"
# The settings that --set accepts in addition to the objective's; other settings of a run do not affect a replay.
SETTINGS = ("loss.*", "optimizer.*", "sampling.temperature", "sampling.max_response_tokens", "sampling.top_k")
_OF_SCHEDULES = tuple(
    f"optimizer.{name}" for name in ("warmup_global_steps", "schedule", "decay_global_steps", "min_learning_rate")
)
# The rows determine the size of an update and the length of a row (sized_for); these numbers only satisfy RunConfig.
_ANY_BATCH = {"num_prompts": 1, "mini_batch_prompts": 1, "responses_per_prompt": 2**20, "max_tokens_per_row": 2**30}

# The options that are settings of a run, by the title of their group in the help.
SETTING_OPTIONS: dict[str, tuple[SettingOption, ...]] = {
    "updates": (
        SettingOption("--learning-rate", "optimizer.learning_rate", "X"),
        SettingOption("--weight-decay", "optimizer.weight_decay", "X"),
        SettingOption("--clip-grad", "optimizer.clip_grad", "X"),
    ),
    "ranks": (
        SettingOption("--device", "device", default_text="cuda if there is a GPU for every rank"),
        SettingOption("--dtype", "model.dtype", default_text="float32 on the CPU, else bfloat16"),
        SettingOption(
            "--max-tokens-per-row", ROW_TOKENS_SETTING, "N", default_text=f"{ROW_TOKENS}, or the longest sequence"
        ),
        SettingOption("--seed", "seed", "N"),
    ),
}
FLAGS = {option.setting: option.flag for group in SETTING_OPTIONS.values() for option in group}


@dataclass(frozen=True, kw_only=True)
class ReplayOptions:
    """The options of the command line; None: not given."""

    model: Path
    rollouts: Path
    output: Path
    objective: str
    settings: list[str]  # the values of --set: KEY=VALUE
    parallel: str = ""
    run: Path | None = None  # the folder of the run whose responses the rows are
    mini_batch_groups: int | None = None
    updates: int | None = None
    given: Mapping[str, Any] = field(default_factory=dict)  # by `section.key`, the values of SETTING_OPTIONS


def replay_config(options: ReplayOptions, num_gpus: int) -> RunConfig:
    """The settings of the replay's policy. Raises UserError with one line per problem.

    By default the replay computes on GPUs in bfloat16 if `num_gpus` suffice for one per rank, otherwise on the CPU in
    float32.
    """
    values: dict[str, Any] = {
        "name": "replay",
        "device": "cpu",
        "model": {"hf_path": str(options.model), "megatron_path": "", "dtype": "float32"},
        "data": {"train_file": "", "heldout_file": ""},
        "parallel": parse_parallel(options.parallel),
        "batch": _ANY_BATCH,
        "optimizer": {"warmup_global_steps": 0},
    }
    with naming(MESH_FLAGS):
        config = parse_run_config(values)
    device = options.given.get("device") or ("cuda" if num_gpus >= config.parallel.world_size else "cpu")
    chosen = {"device": device, "model.dtype": "bfloat16" if device == "cuda" else "float32", **options.given}
    chosen.pop(ROW_TOKENS_SETTING, None)  # sized_for applies it, with the lengths of the rows
    with naming(FLAGS):
        config = with_overrides(config, [f"{setting}={json.dumps(value)}" for setting, value in chosen.items()])
    assignments = [f"objective.name={options.objective}", *map(_override, options.settings)]
    with naming({"objective.name": "--objective"}):
        if options.run is None:
            config = with_overrides(config, assignments)
        else:
            config = with_sampling_of_run(config, assignments, options.run)
    if config.device == "cuda" and num_gpus < config.parallel.world_size:
        raise UserError(
            f"--device cuda: {config.parallel.world_size} ranks need a GPU each, {num_gpus} are visible; lower "
            "--parallel or give --device cpu"
        )
    return config


def _override(assignment: str) -> str:
    key = assignment.partition("=")[0].strip()
    if key in ("name", "objective.name"):
        raise UserError(f"--set {assignment}: choose the objective with --objective")
    if "." not in key or key.startswith("objective."):
        return assignment if "." in key else f"objective.{assignment.strip()}"
    if key in _OF_SCHEDULES:
        raise UserError(f"--set {assignment}: a replay's learning rate is constant; set optimizer.learning_rate")
    if key in SETTINGS or f"{key.partition('.')[0]}.*" in SETTINGS:
        return assignment
    raise UserError(
        f"--set {assignment}: {key} has no effect in a replay; known: the objective's own settings, "
        f"{', '.join(SETTINGS)}"
    )


def sized_for(config: RunConfig, longest: int, longest_response: int, max_tokens_per_row: int | None) -> RunConfig:
    """`config` with room for sequences of `longest` tokens, of which the response has up to `longest_response`.

    The response limit of the run that sampled them is kept if the overlong penalty needs it. Raises UserError.
    """
    limit = config.sampling.max_response_tokens
    if not config.loss.overlong_penalty.enabled:
        limit = max(1, longest_response)
    prompt = max(1, longest - limit)
    multiple = row_multiple(config.parallel.context, config.parallel.tensor)
    row_tokens = max_tokens_per_row or max(ROW_TOKENS, -(-(prompt + limit) // multiple) * multiple)
    return with_overrides(
        config,
        [
            f"sampling.max_prompt_tokens={prompt}",
            f"sampling.max_response_tokens={limit}",
            f"batch.max_tokens_per_row={row_tokens}",
        ],
    )
