"""The end of a run: its output, and the launch of a run that has already finished.

A run has finished when its summary exists, which is written last (report/run_end.py). A process that fails after that
loses nothing, so the same launch succeeds again: it writes missing files and starts no roles.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from minpro_megatron.checkpoints.resume_point import CHECKPOINTS, complete_manifests
from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import FAILED, SUCCEEDED, UserError
from minpro_megatron.monitor.progress import duration
from minpro_megatron.monitor.server_use import ServerUse
from minpro_megatron.monitor.summary import HF_EXPORT, RunSummary, read_summary
from minpro_megatron.run_folder.early_end import STARTS


def finish_again(config: RunConfig, summary: RunSummary) -> int:
    """The launch of a run that has finished with `summary` before: writes missing files and prints the run's
    results. Returns the status code. Raises UserError if the trained weights are missing and cannot be written."""
    print(
        f"run {config.name}: all of its {summary.steps} global steps were finished before; files in {config.run_dir}. "
        "To repeat it, give a new name=...; to continue it, raise num_global_steps"
    )
    output = config.run_dir / HF_EXPORT
    if summary.hf_export is not None and not output.is_dir():
        _export_again(config, summary, output)
    return finish(config)


def _export_again(config: RunConfig, summary: RunSummary, output: Path) -> None:
    checkpoints = config.run_dir / CHECKPOINTS
    complete = complete_manifests(checkpoints) if checkpoints.is_dir() else ()
    found = next((one for one in complete if one.policy_version == summary.steps), None)
    if found is None:
        raise UserError(
            f"name = {config.name}: {output} is missing, and there is no checkpoint of version {summary.steps} to "
            "write it from; put either back, or repeat the run under a new name=..."
        )
    from minpro_megatron.conversion.convert import to_hf  # imports torch, which takes seconds and is rarely needed
    from minpro_megatron.monitor.byte_progress import byte_progress

    to_hf(checkpoints / found.folder_name, output, byte_progress)


def finish_despite_failure(config: RunConfig, lines: Sequence[str]) -> int:
    """The same as `finish` if roles failed after the run had finished; `lines` describe the failures."""
    print("\n".join([*lines, "the run had finished before that, so nothing is lost"]), file=sys.stderr)
    return finish(config)


def finish(config: RunConfig) -> int:
    """Prints the results of a run whose roles have all finished. Returns the status code."""
    summary = read_summary(config.run_dir)
    if summary is None:
        print(f"error: all roles exited with 0 but wrote no {config.run_dir / 'summary.json'}", file=sys.stderr)
        return FAILED
    for line in finished_lines(config, summary, report_of(config)):
        print(line)
    return SUCCEEDED


def report_of(config: RunConfig) -> Path | None:
    """The report; it is written if the trainer has not written it. An error here does not fail the run."""
    try:
        if (written := config.run_dir / "report.html").exists():
            return written
        from minpro_megatron.report.report import write_report

        return write_report(config.run_dir)
    except Exception as error:
        print(f"warning: no report: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def finished_lines(config: RunConfig, summary: RunSummary, report: Path | None) -> list[str]:
    """The output of a finished run: accuracy and mean reward before and after, and the paths of its files."""
    starts = len(list((config.run_dir / STARTS).glob("[0-9]*")))
    took = f"in {duration(summary.wall_time_s)}"  # of the last start
    lines = [
        f"finished {summary.steps} global steps ({summary.updates} updates) "
        f"{took if starts < 2 else f'in {starts} starts, the last one {took}'}, "
        f"staleness {summary.smallest_staleness}-{summary.largest_staleness}"
    ]
    before, after = summary.pass_at_1_before, summary.pass_at_1_after
    if before is not None and after is not None and summary.servers is None:  # a timer trains nothing
        lines.append(
            f"pass@1       {100 * before:.1f} % +- {100 * (summary.standard_error_before or 0):.1f} before, "
            f"{100 * after:.1f} % +- {100 * (summary.standard_error_after or 0):.1f} after "
            f"({summary.num_evaluation_samples} samples, standard errors)"
        )
        rewards = summary.mean_reward_before, summary.mean_reward_after
        lines += [f"mean reward  {rewards[0]:.3f} before, {rewards[1]:.3f} after"] if None not in rewards else []
    if summary.servers is not None:
        lines += server_lines(summary.servers)
    if report is not None:
        lines.append(f"report       {report}")
    lines.append(f"TensorBoard  tensorboard --logdir {config.run_dir / 'tensorboard'}")
    if summary.hf_export is not None:
        lines.append(f"HF weights   {config.run_dir / HF_EXPORT}")
    return lines


def server_lines(use: ServerUse) -> list[str]:
    """The measurements of a timer run."""
    line = f"servers      {use.tokens_per_s:,.0f} tokens/s together ({use.num_servers:.3g} of them)"
    if use.idle_share is not None:
        line += f", idle for {100 * use.idle_share:.0f} % of the time"
    if use.tokens_per_s_if_never_idle is not None:
        line += f"; {use.tokens_per_s_if_never_idle:,.0f} tokens/s without that"
    return [
        line,
        f"batches      {median(use.batch_seconds):.1f} s each (median), {max(use.batch_seconds):.1f} s at most",
    ]
