"""Every generated page."""

from pathlib import Path

from docs.generator import commands, settings
from minpro_megatron.metrics.declared import metric_table

FOLDER = Path(__file__).resolve().parents[1] / "reference"
_METRICS = (
    "TensorBoard and `metrics.jsonl` hold these scalars, merged exactly over ranks and micro-batches. A name that "
    "ends in `<...>` stands for a family of scalars. The reduction states how the values of ranks are merged; "
    "`derived` metrics are computed from merged ones."
)


def all_pages() -> dict[Path, str]:
    """The path and the text of every page of docs/reference/."""
    texts = [
        ("commands.md", "Commands", commands.overview()),
        *commands.group_pages(),
        ("settings.md", "Settings", settings.settings_page()),
        ("objective_settings.md", "Settings of the objective", settings.objective_settings_page()),
        ("loss_settings.md", "Settings of the loss", settings.loss_settings_page()),
        ("environment_settings.md", "Settings of the environment", settings.environment_settings_page()),
        ("metrics.md", "Metrics", f"{_METRICS}\n\n{metric_table()}"),
    ]
    note = "<!-- Written by `python -m docs.generator` from the code. Do not edit. -->"
    return {FOLDER / name: f"{note}\n\n# {title}\n\n{text}" for name, title, text in texts}
