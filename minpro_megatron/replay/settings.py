"""Converts the options of a replay to validated run settings."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minpro_megatron.batching.shards import row_multiple
from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.config.run import RunConfig, parse_run_config, with_overrides
from minpro_megatron.errors import UserError

ROW_TOKENS = 4096  # of a packed row, unless a sequence is longer
# The settings that --set accepts in addition to the objective's; other settings of a run do not affect a replay.
SETTINGS = ("loss.*", "optimizer.*", "sampling.temperature", "sampling.max_response_tokens")
# The rows determine the size of an update and the length of a row (sized_for); these numbers only satisfy RunConfig.
_ANY_BATCH = {"num_prompts": 1, "mini_batch_prompts": 1, "responses_per_prompt": 2**20, "max_tokens_per_row": 2**30}


@dataclass(frozen=True, kw_only=True)
class ReplayOptions:
    """The options of the command line; None: not given."""

    model: Path
    rollouts: Path
    output: Path
    objective: str
    settings: list[str]  # the values of --set: KEY=VALUE
    parallel: str = ""
    mini_batch_groups: int | None = None
    updates: int | None = None
    learning_rate: str | None = None
    weight_decay: str | None = None
    clip_grad: str | None = None
    packing: bool = True
    max_tokens_per_row: int | None = None
    seed: int = 0
    device: str | None = None
    dtype: str | None = None


def parse_parallel(text: str) -> dict[str, Any]:
    """{axis: degree} of "tensor=2,context=2"; "pipeline_layers=3+2+1" is a list.

    Raises UserError for an unknown axis or a degree that is not a number.
    """
    known = ", ".join(ParallelConfig.axes())
    degrees: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        axis, _, degree = (piece.strip() for piece in part.partition("="))
        if axis not in ParallelConfig.axes():
            raise UserError(f"--parallel {text}: there is no axis {axis!r}; known: {known}")
        if axis in degrees:
            raise UserError(f"--parallel {text}: {axis} is given twice")
        listed = axis == "pipeline_layers"
        numbers = [number.strip() for number in degree.split("+")] if listed else [degree]
        if not all(number.isascii() and number.isdigit() for number in numbers):
            needed = f"whole numbers, such as {axis}=2+3" if listed else f"a whole number, such as {axis}=2"
            raise UserError(f"--parallel {text}: {axis} needs {needed} (got {degree!r})")
        degrees[axis] = [int(number) for number in numbers] if listed else int(degree)
    return degrees


def replay_config(options: ReplayOptions, num_gpus: int) -> RunConfig:
    """The settings of the replay's policy. Raises UserError with one line per problem.

    By default the replay computes on GPUs in bfloat16 if `num_gpus` suffice for one per rank, otherwise on the CPU in
    float32.
    """
    values: dict[str, Any] = {
        "name": "replay",
        "seed": options.seed,
        "device": "cpu",
        "model": {"hf_path": str(options.model), "megatron_path": "", "dtype": "float32"},
        "data": {"train_file": "", "heldout_file": ""},
        "parallel": parse_parallel(options.parallel),
        "batch": {"packing": options.packing, **_ANY_BATCH},
        "optimizer": {"warmup_global_steps": 0},
    }
    config = parse_run_config(values)
    device = options.device or ("cuda" if num_gpus >= config.parallel.world_size else "cpu")
    given = {
        "device": device,
        "model.dtype": options.dtype or ("bfloat16" if device == "cuda" else "float32"),
        "objective.name": options.objective,
        "optimizer.learning_rate": options.learning_rate,
        "optimizer.weight_decay": options.weight_decay,
        "optimizer.clip_grad": options.clip_grad,
    }
    overrides = [f"{key}={value}" for key, value in given.items() if value is not None]
    config = with_overrides(config, overrides + [_override(assignment) for assignment in options.settings])
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
    if key == "optimizer.warmup_global_steps":
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
