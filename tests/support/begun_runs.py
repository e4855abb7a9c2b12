"""Run folders as an earlier launch left them."""

from pathlib import Path

from minpro_megatron.config.run import RunConfig
from minpro_megatron.launch.resume import CONFIG_FILE
from minpro_megatron.monitor.summary import RunSummary, write_summary
from tests.support.run_examples import example_config


def begin(folder: Path, **changes: object) -> RunConfig:
    """A run that was launched with these settings."""
    config = example_config(folder, **changes)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / CONFIG_FILE).write_text(config.to_json())
    return config


def summary_of(config: RunConfig, steps: int, hf_export: str | None = None) -> RunSummary:
    return RunSummary(
        name=config.name, objective="minpro", seed=0, steps=steps, updates=2 * steps, wall_time_s=1.0,
        wall_time_by_phase_s={}, pass_at_1_before=None, pass_at_1_after=None, standard_error_before=None,
        standard_error_after=None, num_evaluation_samples=0, smallest_staleness=0, largest_staleness=0,
        versions_published=steps, groups_issued=0, groups_consumed=0, groups_dropped=0, hf_export=hf_export,
        package_versions={},
    )  # fmt: skip


def finish(config: RunConfig, steps: int) -> None:
    write_summary(config.run_dir, summary_of(config, steps))
