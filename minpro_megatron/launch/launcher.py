"""Runs a recipe on this machine: checks it, starts and monitors the roles, shows progress, and reports the end."""

import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack

from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import FAILED, INTERRUPTED, SUCCEEDED, WRONG_INPUT, UserError
from minpro_megatron.files.disk_space import naming_full_disk
from minpro_megatron.launch.finished import finish, finish_again, finish_despite_failure, report_of
from minpro_megatron.launch.preflight.run_checks import problems, warnings
from minpro_megatron.launch.recipe import apply_overrides, load_recipe
from minpro_megatron.launch.resume import finished_summary
from minpro_megatron.launch.roles import role_commands, roles_of
from minpro_megatron.launch.run_folder import claimed, first_lines, prepare
from minpro_megatron.launch.starts import begin_start
from minpro_megatron.launch.stopping import Stopping, save_by
from minpro_megatron.launch.supervisor import Failure, Outcome, Supervisor
from minpro_megatron.monitor.history import FILE_NAME as HISTORY_FILE
from minpro_megatron.monitor.logs import explanation, shortened
from minpro_megatron.monitor.progress import Progress
from minpro_megatron.run_folder.start_fence import StartFence, state_end


def launch(recipe: str, overrides: list[str]) -> int:
    """Runs `recipe` with `overrides` to its end and returns the status code (see supervisor). For a run that
    has finished it writes missing files (see finished).

    Raises UserError with one line per problem before anything has started.
    """
    config = apply_overrides(load_recipe(recipe), overrides)
    if (summary := finished_summary(config)) is not None:
        with claimed(config.run_dir):
            return finish_again(config, summary)
    found = problems(config)
    if found:
        raise UserError(found)
    for warning in warnings(config):
        print(f"warning: {warning}", file=sys.stderr)
    with ExitStack() as held:
        with naming_full_disk(config.run_dir, f"runs_dir = {config.runs_dir}", "choose another runs_dir=..."):
            held.enter_context(claimed(config.run_dir))
            incarnation = begin_start(config.run_dir).incarnation
            config_file, goes_on = prepare(config, incarnation)
        fence = StartFence(config.run_dir, incarnation)
        print("\n".join(first_lines(config, incarnation, goes_on)))
        limit = save_by(config, os.environ, time.time())
        commands = role_commands(config, config_file, incarnation, save_by=limit)
        supervisor = Supervisor(
            commands, config.run_dir / "logs", Stopping(config, incarnation, environment=os.environ)
        )
        with fence.explaining(), Progress(config, roles_of(config)) as progress:
            outcome = supervisor.run(guarded_tick(fence, progress.tick))
        fence.check()  # a role may already have failed for the same reason
        status = _conclude(config, outcome)
        state_end(config.run_dir, incarnation)
        return status


def guarded_tick(fence: StartFence, tick: Callable[[], None]) -> Callable[[], None]:
    """`tick`, and a check that the run folder still belongs to this start, which raises RunBlocked."""

    def both() -> None:
        tick()
        fence.look()

    return both


def _conclude(config: RunConfig, outcome: Outcome) -> int:
    """Prints how the run ended and returns its status code."""
    if outcome.status == FAILED and finished_summary(config) is not None:
        return finish_despite_failure(config, closing_lines(outcome))
    if lines := closing_lines(outcome):
        print("\n".join([*lines, remedy_line(config, outcome)]), file=sys.stderr)
    if outcome.status == SUCCEEDED:
        return finish(config)
    if outcome.early_end and outcome.interrupted_by:
        return INTERRUPTED
    if outcome.interrupted_by is None and (config.run_dir / HISTORY_FILE).exists() and (report := report_of(config)):
        print(f"report       {report}", file=sys.stderr)
    return outcome.status


def remedy_line(config: RunConfig, outcome: Outcome) -> str:
    """What the user does after a start that has not finished the run."""
    if outcome.status == WRONG_INPUT:  # the same command would fail in the same way
        return "correct that, then launch again; a setting is corrected in the command or in the recipe"
    if config.debug.trainer == "timer":
        return "measure again under a new name=..."
    return "launch the same command again to resume"


def closing_lines(outcome: Outcome) -> list[str]:
    """The reasons why the roles did not finish, with the part of each failed role's log that explains them."""
    lines = []
    for failure in outcome.failures:
        lines.append(f"error: the role {failure.role} {failure.how}; its log: {failure.log_file}")
        lines.extend(f"  | {line}" for line in _cause(failure) or ["(the log does not state why)"])
    if outcome.left_behind:
        pids = ", ".join(map(str, outcome.left_behind))
        lines.append(f"error: these processes could not be ended: {pids}; end them by hand")
    if outcome.early_end is not None:
        end = outcome.early_end
        lines.append(f"ended after global step {end.policy_version}, with a checkpoint: {end.reason}")
    elif outcome.interrupted_by is not None:
        lines.append(f"interrupted by {outcome.interrupted_by}; all processes were stopped")
    return lines


def _cause(failure: Failure) -> list[str]:
    """The lines that explain the failure: the unexpected error of the rank that failed first, else lines of the log."""
    first = failure.first_rank
    if first is not None and first.traceback:
        return [f"rank {first.rank} on {first.host} failed first:", *shortened(first.traceback)]
    return explanation(failure.log_file, start=failure.log_start, role=failure.role)
