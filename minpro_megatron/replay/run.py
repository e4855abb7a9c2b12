"""A replay from its options to its output: checks, the ranks, and the move of the result to the output folder."""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from minpro_megatron.batching.shards import sequence_multiple
from minpro_megatron.config.mesh_option import FLAGS as MESH_FLAGS
from minpro_megatron.config.options import naming
from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import FAILED, SUCCEEDED, UserError
from minpro_megatron.files.replacement import check_replaceable
from minpro_megatron.launch.launcher import closing_lines
from minpro_megatron.launch.preflight.gpu_count import count_gpus
from minpro_megatron.launch.roles import torchrun, trainer_environment
from minpro_megatron.launch.supervisor import Outcome, RoleCommand, Supervisor
from minpro_megatron.models.architecture import read_architecture, refuse_uneven_cuts
from minpro_megatron.models.model_files import max_positions
from minpro_megatron.models.text_files import CONFIG
from minpro_megatron.models.weight_files import weight_problem
from minpro_megatron.replay.batches import replay_batches
from minpro_megatron.replay.job import (
    MODEL,
    RESULT,
    SUMMARY,
    TOKENS,
    ReplayRows,
    read_progress,
    stated_error,
    write_job,
)
from minpro_megatron.replay.progress_lines import ProgressLines
from minpro_megatron.replay.rollouts import Rollout, read_rollouts
from minpro_megatron.replay.sampling_run import refuse_rows_of_others
from minpro_megatron.replay.settings import ROW_TOKENS_SETTING, ReplayOptions, replay_config, sized_for

MAX_LOG_PROB = 1e-3  # rounding of float32 sums of exponentials can exceed 0 a little
_ROLE = "replay"


def run_replay(options: ReplayOptions) -> int:
    """Replays and returns the status code: 0 when the output is complete, else 1, or 130 if interrupted.

    Raises UserError with one line per problem before any rank has started.
    """
    options = replace(options, model=options.model.absolute(), output=options.output.resolve())
    config, rows = checked_replay(options)
    ranks = f"{config.parallel.world_size} ranks ({config.device})"
    print(f"{len(rows.rollouts)} rows, {rows.updates} updates on {ranks}", file=sys.stderr, flush=True)
    log_file = options.output.with_name(f"{options.output.name}.failed.log")
    with _work_folder(options.output) as work:
        write_job(work, config, rows)
        outcome = _run_ranks(config, work)
        if outcome.status == SUCCEEDED:
            _hand_over(work / RESULT, options.output)
            print(f"wrote {options.output}")
            return SUCCEEDED
        error = stated_error(work)
        if error is None and outcome.status == FAILED and (work / f"{_ROLE}.log").exists():
            (work / f"{_ROLE}.log").replace(log_file)
            outcome.failures = [replace(failure, log_file=log_file) for failure in outcome.failures]
        for line in [f"error: {' '.join(error.split())}"] if error else closing_lines(outcome):
            print(line, file=sys.stderr)
        return outcome.status


def checked_replay(options: ReplayOptions) -> tuple[RunConfig, ReplayRows]:
    """Settings and rows. Raises UserError with one line per problem that can be found before the start."""
    config = replay_config(options, num_gpus := count_gpus())
    if config.device == "cpu" and num_gpus and "device" not in options.given:
        print(
            f"{config.parallel.world_size} ranks for {num_gpus} GPUs: computing on the CPU in float32", file=sys.stderr
        )
    if not options.model.is_dir():
        raise UserError(f"--model {options.model}: there is no such folder; give a Hugging Face model folder")
    try:
        architecture = read_architecture(options.model)
    except UserError as error:
        raise UserError(f"--model {options.model}: {error}") from None
    with naming(MESH_FLAGS):
        refuse_uneven_cuts(architecture, config.parallel)
    if problem := weight_problem(options.model, for_servers=False):
        raise UserError(f"--model {options.model}: {problem}")
    _refuse_foreign(options.output)
    rollouts = read_rollouts(
        options.rollouts,
        architecture.vocab_size,
        config.loss.reads_rollout_log_probs,
        config.sampling.top_k,
        "" if options.run is None else f" of --run {options.run}",
    )
    if options.run is not None:
        refuse_rows_of_others(options.run, options.rollouts, rollouts)
    _refuse_too_long(options, rollouts)
    improbable = sum(int((rollout.behavior_log_probs > MAX_LOG_PROB).sum()) for rollout in rollouts)
    if improbable:
        print(
            f"{options.rollouts}: {improbable} behavior_log_probs are above 0, which is impossible for a probability",
            file=sys.stderr,
        )
    config = _with_rows_long_enough(config, options, rollouts)
    batches = replay_batches(rollouts, options.mini_batch_groups, config.loss, config.sampling.max_response_tokens)
    updates = len(batches) if options.updates is None else options.updates
    for index, batch in enumerate(batches[:updates]):
        if not batch.num_trained_tokens:
            raise UserError(
                f"{options.rollouts}: loss_mask: every token of mini-batch {index + 1} of {len(batches)} is masked "
                f"(lines {min(batch.rows) + 1} to {max(batch.rows) + 1}), so its update has no gradient; raise "
                "--mini-batch-groups or remove these rows"
            )
    return config, ReplayRows(rollouts=rollouts, groups_per_batch=options.mini_batch_groups, updates=updates)


def _refuse_too_long(options: ReplayOptions, rollouts: list[Rollout]) -> None:
    """Raises UserError for rows longer than the model's positions: rows or config.json belong to another model."""
    limit = max_positions(options.model)
    for rollout in rollouts:
        if limit is not None and rollout.num_tokens > limit:
            raise UserError(
                f"{options.rollouts}: line {rollout.line}: prompt_ids and response_ids are {rollout.num_tokens} "
                f"tokens, more than max_position_embeddings = {limit} in {options.model / CONFIG}; remove the row, "
                "or raise that number if the servers ran with a longer context"
            )


def _refuse_foreign(output: Path) -> None:
    """Raises UserError if files in `output` that the replay would replace are not from an earlier replay, whose output
    has all three entries or only the first one. Other files may be in the folder."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: it is not a folder; give another")
    foreign = [name for name in (SUMMARY, MODEL) if (output / name).exists() and not (output / TOKENS).is_file()]
    if foreign:
        raise UserError(
            f"--output {output}: its {foreign[0]} is not from an earlier output ({TOKENS} is missing), so it "
            "is not overwritten; give another folder"
        )
    try:
        check_replaceable(output / MODEL)
    except UserError as error:
        raise UserError(f"--output {error}") from None


def _hand_over(result: Path, output: Path) -> None:
    """Moves the result into `output`, summary.json last, so that its presence means a complete output.

    The folder itself is kept: it may be a mount point or contain other files.
    """
    output.mkdir(exist_ok=True)
    for name in (SUMMARY, MODEL, TOKENS):
        former = output / name
        shutil.rmtree(former) if former.is_dir() else former.unlink(missing_ok=True)
    for name in (TOKENS, MODEL, SUMMARY):
        shutil.move(result / name, output / name)


def _with_rows_long_enough(config: RunConfig, options: ReplayOptions, rollouts: list[Rollout]) -> RunConfig:
    multiple = sequence_multiple(config.parallel.context)
    limit = options.given.get(ROW_TOKENS_SETTING)
    for rollout in rollouts if limit is not None else ():
        padded = -(-rollout.num_tokens // multiple) * multiple
        if limit is not None and padded > limit:
            raise UserError(
                f"{options.rollouts}: line {rollout.line}: prompt_ids and response_ids are {rollout.num_tokens} "
                f"tokens, {padded} with padding, more than --max-tokens-per-row {limit}; raise it"
            )
    longest = max(rollout.num_tokens for rollout in rollouts)
    return sized_for(config, longest, max(len(rollout.response_ids) for rollout in rollouts), limit)


@contextmanager
def _work_folder(output: Path) -> Iterator[Path]:
    """A new folder next to `output`, so that the result can be moved there by a rename; removed at the end."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror}: {error.filename}; choose another folder") from None
    try:
        (work / RESULT).mkdir()
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _run_ranks(config: RunConfig, work: Path) -> Outcome:
    environment = dict(os.environ) | {"PYTHONUNBUFFERED": "1"} | trainer_environment(config.device)
    if config.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    ranks = [*torchrun(config.parallel.world_size), "-m", "minpro_megatron.replay.ranks", str(work)]
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        _Tokens(),
        TimeRemainingColumn(),
    ]
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as display:
        task = display.add_task("", total=None)
        lines = ProgressLines(partial(print, file=sys.stderr, flush=True))

        def show() -> None:
            now = read_progress(work)
            display.update(task, description=now.phase, completed=now.done, total=now.total)
            if not console.is_terminal:
                lines.show(now, time.monotonic())

        return Supervisor([RoleCommand(_ROLE, ranks, environment)], work).run(show)


class _Tokens(ProgressColumn):
    def render(self, task: Task) -> Text:
        done = "" if task.total is None else f"{task.completed:.0f}/{task.total:.0f} tokens"
        return Text(f"{done}, {task.speed:.0f}/s" if task.speed else done)
