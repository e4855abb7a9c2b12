"""Settings that name files are marked by their type, so that no table of names can forget one."""

from pathlib import Path
from typing import Any, get_args

from minpro_megatron.cluster.paths import in_workspace
from minpro_megatron.config.listing import fields_of, path_settings
from minpro_megatron.config.run import RunConfig
from minpro_megatron.launch.preflight.node_checks import files_needed
from minpro_megatron.launch.topology import NodeShare
from minpro_megatron.recipes.prefix_rl import FOLDER, supervised
from tests.support.run_examples import example_config

# The settings of text that names no path. A new setting of text fails the test below until it is here or has a type
# of config/path_type.py.
TEXTS = {
    "name", "data.instruction", "data.chat_template_arguments", "data.source_weights", "data.filter",
    "objective.name", "objective.settings", "loss.advantage", "sampling.extra_stop_tokens", "server.urls",
    "server.api_key_variable", "server.host", "environment.name", "environment.python_tool.url", "reward.function",
    "reward.by_source", "reward.urls", "collector.host", "evaluation.benchmarks.name", "wandb.project", "wandb.entity",
    "debug.trace_steps", "debug.profile_steps",
    # the libraries' own names
    "server.arguments", "model.megatron", "optimizer.megatron", "parallel.ddp",
}  # fmt: skip


def takes_text(annotation: Any) -> bool:
    return annotation in (str, Path) or any(map(takes_text, get_args(annotation)))


def test_every_setting_that_names_a_file_is_marked() -> None:
    of_text = {path for path, field in fields_of(RunConfig) if takes_text(field.annotation)}
    assert of_text - TEXTS == path_settings().keys()
    assert of_text >= TEXTS


def test_every_path_is_looked_at_before_the_start(tmp_path: Path) -> None:
    """Each node opens the files that its roles need; the run folder is written to."""
    benchmarks = {"num_prompts": 1, "benchmarks": [{"name": "b", "file": "b.jsonl"}]}
    runs = [example_config(tmp_path, evaluation=benchmarks, debug={"journal": "j"}), supervised()]
    share = NodeShare(ranks=1, num_servers=1, collects=True)
    found = {
        setting
        for run in [*runs, example_config(tmp_path, evaluation=benchmarks)]
        for setting, _ in files_needed(run, share)
    }
    assert found == {setting.removesuffix(".file") for setting in path_settings()} - {"runs_dir"}


def test_demonstrations_are_moved_to_the_workspace_of_a_cluster() -> None:
    checkout = FOLDER.parents[1]
    assert in_workspace(supervised(), "/ws", checkout).data.demonstrations == (
        f"/ws/{(FOLDER / 'demonstrations.jsonl').relative_to(checkout)}"
    )
