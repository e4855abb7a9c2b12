"""The results of a finished run, as `run_dir/summary.json`."""

from importlib import metadata
from pathlib import Path

from minpro_megatron.config.base import Section
from minpro_megatron.config.run import RunConfig
from minpro_megatron.files.replacement import replace_file_in
from minpro_megatron.monitor.server_use import ServerUse
from minpro_megatron.records import CollectorTotals

FILE_NAME = "summary.json"
HF_EXPORT = "hf_export"  # folder of the trained weights, in run_dir
MAIN_PACKAGES = (
    "minpro-megatron",
    "torch",
    "megatron-core",
    "sglang",
    "transformers",
    "transformer-engine",
    "numpy",
)


class RunSummary(Section):
    """The results of a finished run. pass@1 and its standard error are shares; None: not evaluated, or written by a
    version without this field."""

    name: str
    objective: str
    seed: int
    steps: int  # global steps
    updates: int  # optimizer updates
    wall_time_s: float
    wall_time_by_phase_s: dict[str, float]
    pass_at_1_before: float | None
    pass_at_1_after: float | None
    standard_error_before: float | None
    standard_error_after: float | None
    mean_reward_before: float | None = None  # held-out
    mean_reward_after: float | None = None
    num_evaluation_samples: int  # prompts x samples of one evaluation
    smallest_staleness: int
    largest_staleness: int
    versions_published: int
    groups_issued: int
    groups_consumed: int
    groups_dropped: int
    groups_not_graded: int = 0  # included in groups_dropped
    hf_export: str | None  # the trained weights as a Hugging Face folder
    package_versions: dict[str, str]
    servers: ServerUse | None = None  # measured with debug.trainer = timer


def summarize(
    config: RunConfig,
    totals: CollectorTotals,
    *,
    steps: int,
    updates: int,
    wall_time_s: float,
    wall_time_by_phase_s: dict[str, float],
    hf_export: Path | str | None,
    servers: ServerUse | None = None,
) -> RunSummary:
    """The summary of a run from its settings, the collector's totals and the trainer's clocks.

    "Before" and "after" are the held-out evaluations of the initial weights and of the last version. A failed
    evaluation is None and is not replaced by that of another version.
    """
    heldout = {evaluation.policy_version: evaluation for evaluation in totals.evaluations if not evaluation.benchmark}
    before, after = heldout.get(0), heldout.get(config.num_global_steps)
    return RunSummary(
        name=config.name,
        objective=config.objective.name,
        seed=config.seed,
        steps=steps,
        updates=updates,
        wall_time_s=wall_time_s,
        wall_time_by_phase_s=wall_time_by_phase_s,
        pass_at_1_before=before.pass_at_1 if before else None,
        pass_at_1_after=after.pass_at_1 if after else None,
        standard_error_before=before.standard_error if before else None,
        standard_error_after=after.standard_error if after else None,
        mean_reward_before=before.mean_reward if before else None,
        mean_reward_after=after.mean_reward if after else None,
        num_evaluation_samples=before.num_prompts * before.samples_per_prompt if before else 0,
        smallest_staleness=totals.smallest_staleness,
        largest_staleness=totals.largest_staleness,
        versions_published=totals.versions_published,
        groups_issued=totals.groups_issued,
        groups_consumed=totals.groups_consumed,
        groups_dropped=totals.groups_dropped,
        groups_not_graded=totals.groups_not_graded,
        hf_export=str(hf_export) if hf_export else None,
        package_versions=installed_versions(),
        servers=servers,
    )


def installed_versions() -> dict[str, str]:
    """The versions of the main packages that are installed."""
    versions = {}
    for package in MAIN_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def write_summary(run_dir: Path, summary: RunSummary) -> None:
    replace_file_in(Path(run_dir), FILE_NAME, summary.model_dump_json(indent=2) + "\n")


def read_summary(run_dir: Path) -> RunSummary | None:
    """The run's summary; None if it has none, because it has not finished."""
    try:
        text = (Path(run_dir) / FILE_NAME).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    return RunSummary.model_validate_json(text)
