"""Runs a recipe on this machine: checks, starts and watches the roles, shows progress, says how it ended."""

import fcntl
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from minpro_megatron.config.run import RunConfig
from minpro_megatron.launch.logs import explanation
from minpro_megatron.launch.preflight import problems
from minpro_megatron.launch.recipe import apply_overrides, load_recipe
from minpro_megatron.launch.resume import CONFIG_FILE, holds_a_run, next_incarnation
from minpro_megatron.launch.roles import role_commands, roles_of
from minpro_megatron.launch.supervisor import FAILED, FINISHED, Outcome, Supervisor
from minpro_megatron.launch.user_error import UserError
from minpro_megatron.monitor.files import replace_file
from minpro_megatron.monitor.progress import Progress, duration
from minpro_megatron.monitor.server_use import ServerUse
from minpro_megatron.monitor.summary import RunSummary, read_summary
from minpro_megatron.rollout.resume_point import read_latest

# What an earlier incarnation says of itself: it would mislead this one's roles and display.
_OF_ONE_INCARNATION = ("endpoints", "report.html", "status", "summary.json")
# What a run that failed while it started may have left besides.
_LEFTOVERS = (
    "checkpoints", "evaluations.jsonl", "journal.sqlite", "journal.sqlite-shm", "journal.sqlite-wal", "logs",
    "metrics.jsonl", "published", "routes", "tensorboard",
)  # fmt: skip


def launch(recipe: str, overrides: list[str]) -> int:
    """Runs `recipe` with `overrides` to its end and returns the status code (see supervisor).

    Raises UserError, with one line a problem, before anything has started.
    """
    config = apply_overrides(load_recipe(recipe), overrides)
    found = problems(config)
    if found:
        raise UserError(found)
    with _claimed(config.run_dir):
        goes_on = holds_a_run(config.run_dir)
        _remove(config.run_dir, _OF_ONE_INCARNATION if goes_on else _OF_ONE_INCARNATION + _LEFTOVERS)
        config_file = config.run_dir.absolute() / CONFIG_FILE
        replace_file(config_file, config.to_json())
        incarnation = next_incarnation(config.run_dir)
        print(
            f"run {config.name}: {config.objective.name}, {config.num_global_steps} global steps; "
            f"files in {config.run_dir}"
        )
        if goes_on:
            print(_where_it_goes_on(config.run_dir, incarnation))
        supervisor = Supervisor(role_commands(config, config_file, incarnation), config.run_dir / "logs")
        with Progress(config, roles_of(config)) as progress:
            outcome = supervisor.run(progress.tick)
        return _conclude(config, outcome)


@contextmanager
def _claimed(run_dir: Path) -> Iterator[None]:
    """Holds the run folder against a second launcher. The lock ends with this process, however it ends."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "launch.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"name = {run_dir.name}: another launch is using {run_dir}; choose another name=..."
            ) from None
        yield


def _where_it_goes_on(run_dir: Path, incarnation: int) -> str:
    manifest = read_latest(run_dir)
    where = f"from its checkpoint after global step {manifest.policy_version}" if manifest else "from its beginning"
    return f"it goes on {where} (start {incarnation + 1} of this run)"


def _remove(run_dir: Path, names: tuple[str, ...]) -> None:
    for name in names:
        path = run_dir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _conclude(config: RunConfig, outcome: Outcome) -> int:
    """Says how the run ended and returns its status code."""
    for line in closing_lines(outcome):
        print(line, file=sys.stderr)
    if outcome.status == FINISHED:
        return _finish(config)
    return outcome.status


def closing_lines(outcome: Outcome) -> list[str]:
    """Why the run did not finish, with the part of each failed role's log that explains it."""
    lines = []
    for failure in outcome.failures:
        lines.append(f"error: the role {failure.role} {failure.how}; its log: {failure.log_file}")
        told = explanation(failure.log_file, start=failure.log_start) or ["(the log does not say why)"]
        lines.extend(f"  | {line}" for line in told)
    if outcome.left_behind:
        pids = ", ".join(map(str, outcome.left_behind))
        lines.append(f"error: these processes could not be ended: {pids}; end them by hand")
    if outcome.interrupted_by is not None:
        lines.append(f"interrupted by {outcome.interrupted_by}; all processes were stopped")
    return [*lines, "launch the same command again to go on"] if lines else []


def _finish(config: RunConfig) -> int:
    summary = read_summary(config.run_dir)
    if summary is None:
        print(f"error: all roles exited with 0 but wrote no {config.run_dir / 'summary.json'}", file=sys.stderr)
        return FAILED
    for line in finished_lines(config, summary, _report(config)):
        print(line)
    return FINISHED


def _report(config: RunConfig) -> Path | None:
    """The report, written if the trainer has not; a run that has succeeded does not fail over its pictures."""
    try:
        if (written := config.run_dir / "report.html").exists():
            return written
        from minpro_megatron.monitor.report import write_report

        return write_report(config.run_dir)
    except Exception as error:
        print(f"warning: no report: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def finished_lines(config: RunConfig, summary: RunSummary, report: Path | None) -> list[str]:
    """What a finished run prints: accuracy before and after, and where everything is."""
    lines = [
        f"finished {summary.steps} global steps ({summary.updates} updates) in "
        f"{duration(summary.wall_time_s)}, staleness {summary.smallest_staleness}-{summary.largest_staleness}"
    ]
    before, after = summary.pass_at_1_before, summary.pass_at_1_after
    if before is not None and after is not None and summary.servers is None:  # a timer trains nothing
        lines.append(
            f"pass@1       {100 * before:.1f} % +- {100 * (summary.standard_error_before or 0):.1f} before, "
            f"{100 * after:.1f} % +- {100 * (summary.standard_error_after or 0):.1f} after "
            f"({summary.num_evaluation_samples} samples, standard errors)"
        )
    if summary.servers is not None:
        lines += server_lines(summary.servers)
    if report is not None:
        lines.append(f"report       {report}")
    lines.append(f"TensorBoard  tensorboard --logdir {config.run_dir / 'tensorboard'}")
    if summary.hf_export is not None:
        lines.append(f"HF weights   {summary.hf_export}")
    return lines


def server_lines(use: ServerUse) -> list[str]:
    """What a timer found out about the servers."""
    line = f"servers      {use.tokens_per_s:,.0f} tokens/s together ({use.num_servers:.3g} of them)"
    if use.idle_share is not None:
        line += f", idle for {100 * use.idle_share:.0f} % of the time"
    if use.tokens_per_s_if_never_idle is not None:
        line += f"; {use.tokens_per_s_if_never_idle:,.0f} tokens/s without that"
    return [
        line,
        f"batches      {median(use.batch_seconds):.1f} s each (median), {max(use.batch_seconds):.1f} s at most",
    ]
