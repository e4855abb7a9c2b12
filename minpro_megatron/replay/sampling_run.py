"""The run whose responses are replayed: its sampling settings are the replay's, and other runs' rows are refused."""

from collections.abc import Sequence
from pathlib import Path

from minpro_megatron.batching.supports import largest_support
from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.config.sampling import SamplingConfig
from minpro_megatron.errors import UserError
from minpro_megatron.launch.recipe import read_config
from minpro_megatron.replay.rollouts import Rollout

# What the rows' log-probs and the overlong penalty depend on.
SAMPLING = ("temperature", "top_k", "max_response_tokens")


def with_sampling_of_run(config: RunConfig, assignments: list[str], run: Path) -> RunConfig:
    """`config` with the sampling settings of the run in the folder `run`, and with `assignments`. Raises UserError if
    the run's settings cannot be read, or an assignment contradicts them."""
    theirs = read_config(run / "run.json", "--run").sampling
    config = with_overrides(config, [f"sampling.{name}={getattr(theirs, name)}" for name in SAMPLING])
    changed = with_overrides(config, assignments)
    for name in SAMPLING:
        given, recorded = getattr(changed.sampling, name), getattr(theirs, name)
        if given != recorded:
            raise UserError(
                f"--set sampling.{name}={given}: --run {run} has sampling.{name} = {recorded}, with which its "
                "responses were sampled; leave the setting out"
            )
    return changed


def refuse_rows_of_others(run: Path, rows: Path, rollouts: Sequence[Rollout]) -> None:
    """Raises UserError for the first row that the run in the folder `run` cannot have sampled."""
    sampling = read_config(run / "run.json", "--run").sampling
    for rollout in rollouts:
        if problem := _excess(rollout, sampling):
            raise UserError(
                f"{rows}: line {rollout.line}: {problem} of --run {run}; give the run that sampled these rows"
            )


def _excess(rollout: Rollout, sampling: SamplingConfig) -> str:
    """What of the row exceeds the settings; "" if nothing does."""
    for field, ids, name in (
        ("prompt_ids", rollout.prompt_ids, "max_prompt_tokens"),
        ("response_ids", rollout.response_ids, "max_response_tokens"),
    ):
        if len(ids) > (limit := getattr(sampling, name)):
            return f"{field} has {len(ids)} tokens, more than sampling.{name} = {limit}"
    if rollout.supports is not None:
        most = rollout.supports[: len(rollout.response_ids)].max(initial=0)
        if most > (limit := largest_support(sampling.top_k)):
            return (
                f"kept_ids has {most} ids at a token, more than {limit}, the most for sampling.top_k = {sampling.top_k}"
            )
    return ""
