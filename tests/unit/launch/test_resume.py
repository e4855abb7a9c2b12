"""Whether a run folder's run can go on: same experiment, unfinished, with a whole checkpoint; and its incarnations."""

import json
from pathlib import Path

import pytest

from minpro_megatron.checkpoints.resume_point import CHECKPOINTS, LATEST
from minpro_megatron.config.objective import CispoConfig
from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.config.staleness import StalenessConfig
from minpro_megatron.launch.resume import CONFIG_FILE, holds_a_run, obstacles
from minpro_megatron.launch.run_folder import first_lines, prepare
from tests.support.begun_runs import begin, finish
from tests.support.journals import collect, in_journal, nothing
from tests.support.rollout_fakes import collected, issued_groups
from tests.support.run_examples import save_checkpoint, write_example_files


def only_obstacle(config: RunConfig) -> str:
    (obstacle,) = obstacles(config)
    return obstacle


def test_the_same_settings_go_on(tmp_path: Path) -> None:
    config = begin(tmp_path)
    assert list(obstacles(config)) == []
    save_checkpoint(config, 2)
    assert list(obstacles(config)) == []


@pytest.mark.parametrize(
    "override",
    [
        "parallel.tensor=2", "device=cpu", "num_global_steps=9", "server.count=3", "server.start_timeout_s=5",
        "collector.port=4000", "reward.workers=2", "collector.journal_keep_steps=0", "publish.transport=disk",
        "checkpoint.every_steps=1", "batch.max_tokens_per_row=128", "batch.packing=false", "model.recompute=full",
    ],
)  # fmt: skip
def test_where_and_how_a_run_computes_may_change(tmp_path: Path, override: str) -> None:
    begun = begin(tmp_path)
    save_checkpoint(begun, 1)
    assert list(obstacles(with_overrides(begun, [override]))) == []


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("seed=1", "seed: 0 -> 1"),
        ("optimizer.learning_rate=0.5", "optimizer.learning_rate: 1e-06 -> 0.5"),
        ("staleness.delay_steps=1", "staleness.delay_steps: 2 -> 1"),
        ("batch.dynamic_sampling=true", "batch.dynamic_sampling: false -> true"),
        ("sampling.temperature=0.5", "sampling.temperature: 1.0 -> 0.5"),
        ("reward.function=other", 'reward.function: "calculator" -> "other"'),
        ("data.train_file=other.jsonl", 'train.jsonl" -> "other.jsonl"'),
        ("evaluation.every_steps=3", "evaluation.every_steps: 0 -> 3"),
    ],
)
def test_another_experiment_is_refused_and_its_settings_are_named(tmp_path: Path, override: str, shown: str) -> None:
    found = only_obstacle(with_overrides(begin(tmp_path), [override]))
    assert found.startswith(f"name = example: {tmp_path}/runs/example holds a run with other settings (")
    assert shown in found
    assert found.endswith("; give a new name=..., or the same settings")


def test_a_run_begun_when_the_reward_belonged_to_the_collector_resumes(tmp_path: Path) -> None:
    write_example_files(tmp_path)
    config = begin(tmp_path, reward={"function": "math", "workers": 3})
    save_checkpoint(config, 1)
    file = config.run_dir / CONFIG_FILE
    values = json.loads(file.read_text())
    del values["reward"]
    values["collector"] |= {
        "reward": "math", "reward_by_source": {}, "right_reward": 1.0, "reward_timeout_s": 5.0, "reward_workers": 3,
    }  # fmt: skip
    file.write_text(json.dumps(values))
    assert list(obstacles(with_overrides(config, ["reward.workers=1"]))) == []
    assert "reward.function" in only_obstacle(with_overrides(config, ["reward.function=dapo"]))
    prepare(config, incarnation=1)
    assert json.loads(file.read_text())["reward"]["function"] == "math"


@pytest.mark.parametrize("steps", [None, 2], ids=["ended early", "may be made longer"])
def test_a_measurement_is_not_taken_up_again(tmp_path: Path, steps: int | None) -> None:
    """Its times are of one start, and a timer would ask for batch 0 again."""
    config = begin(tmp_path, debug={"trainer": "timer"})
    if steps is not None:
        finish(config, steps)
    found = only_obstacle(config)
    assert found.startswith(
        f"name = example: debug.trainer = timer: {config.run_dir} contains a measurement, which cannot"
    )
    assert f"give a new name=... (its rollouts are in {config.run_dir}/journal.sqlite), or remove" in found


def test_of_many_other_settings_some_are_shown(tmp_path: Path) -> None:
    config = begin(tmp_path).model_copy(update={"objective": CispoConfig(), "seed": 3})
    found = only_obstacle(config.model_copy(update={"staleness": StalenessConfig(mode="bounded", max_staleness=7)}))
    assert 'objective.name: "minpro" -> "cispo"' in found
    assert 'staleness.mode: "delay" -> "bounded"' in found
    config = with_overrides(config, [f"sampling.{name}" for name in ("temperature=2", "max_prompt_tokens=15")])
    changed = with_overrides(config, [f"evaluation.{name}=9" for name in ("num_prompts", "samples_per_prompt")])
    changed = with_overrides(changed, ["evaluation.every_steps=9", "evaluation.temperature=9"])
    assert only_obstacle(changed).count(" -> ") == 5
    assert " and 3 more; " not in only_obstacle(changed)
    assert " and 3 more)" in only_obstacle(changed)


@pytest.mark.parametrize("content", [None, "{", '{"name": "x"}', '{"name": "example", "unknown": 1}'])
def test_a_run_of_unknown_settings_is_refused(tmp_path: Path, content: str | None) -> None:
    config = begin(tmp_path)
    (config.run_dir / CONFIG_FILE).unlink()
    if content is not None:
        (config.run_dir / CONFIG_FILE).write_text(content)
    assert "holds a run of unknown settings (run.json cannot be read); give a new name" in only_obstacle(config)


def test_a_finished_run_can_be_launched_again_and_made_longer(tmp_path: Path) -> None:
    config = begin(tmp_path)
    finish(config, 4)
    assert list(obstacles(config)) == []
    longer = with_overrides(config, ["num_global_steps=6"])
    assert list(obstacles(longer)) == []
    save_checkpoint(config, 2)  # batches 2 and 3 are there, version 2 samples batch 4
    assert list(obstacles(longer)) == []


@pytest.mark.parametrize("mode", ["delay", "bounded"])
def test_in_delay_mode_a_checkpoint_that_does_not_say_its_length_must_be_early_enough(
    tmp_path: Path, mode: str
) -> None:
    """Checkpoints of earlier versions do not: the batches that are missing cannot be known from them."""
    config = begin(tmp_path, staleness={"mode": mode, "delay_steps": 2})
    save_checkpoint(config, 3)
    longer = with_overrides(config, ["num_global_steps=6"])
    if mode == "bounded":
        assert list(obstacles(longer)) == []
    else:
        found = only_obstacle(longer)
        assert "num_global_steps = 6: " in found
        assert "was to end after step 4, so the versions after 1 sampled nothing for later steps" in found
        assert "its checkpoint is of version 3; write the name of one of version 2 or before into" in found
    assert list(obstacles(config)) == []


@pytest.mark.parametrize(
    ("version", "mode", "batches", "staleness"),
    [(4, "delay", "batches 4 to 5", 0), (3, "delay", "batch 4", 1), (2, "delay", "", 0), (4, "bounded", "", 0)],
)
def test_a_run_is_made_longer_and_says_which_version_samples_the_missing_batches(
    tmp_path: Path, version: int, mode: str, batches: str, staleness: int
) -> None:
    config = begin(tmp_path, staleness={"mode": mode, "delay_steps": 2})
    finish(config, 4)
    save_checkpoint(config, version, num_global_steps=4)
    longer = with_overrides(config, ["num_global_steps=9"])
    assert list(obstacles(longer)) == []
    said = first_lines(longer, 1, goes_on=True)
    assert said[1] == f"it resumes from its checkpoint after global step {version} (start 2 of this run)"
    if not batches:
        assert len(said) == 2
    else:
        assert said[2].startswith("it is extended from 4 to 9 global steps: the weights that should have sampled ")
        assert f" {batches} no longer exist, so version {version} samples them" in said[2]
        assert f"grows from {staleness} to 2 again" in said[2]


def test_a_run_cannot_end_before_its_checkpoint(tmp_path: Path) -> None:
    config = begin(tmp_path)
    save_checkpoint(config, 3)
    assert list(obstacles(with_overrides(config, ["num_global_steps=3"]))) == []
    found = only_obstacle(with_overrides(config, ["num_global_steps=2"]))
    assert found.startswith("num_global_steps = 2: the run in ")
    assert found.endswith("resumes from its checkpoint after global step 3; raise it")


def test_a_damaged_checkpoint_is_named_with_the_one_to_take(tmp_path: Path) -> None:
    config = begin(tmp_path)
    save_checkpoint(config, 1)
    save_checkpoint(config, 2)
    checkpoints = config.run_dir / CHECKPOINTS
    (checkpoints / "step-000002" / "weights").write_bytes(b"ab")
    found = only_obstacle(config)
    assert found.startswith(f"name = example: {checkpoints}/step-000002/weights: 2 bytes, but manifest.json says 3")
    assert found.endswith(f"; step-000001 is complete: write this name into {checkpoints / LATEST} to resume from it")
    (checkpoints / LATEST).write_text("step-000001\n")
    assert list(obstacles(config)) == []


def test_a_folder_holds_a_run_once_it_has_rollouts(tmp_path: Path) -> None:
    assert not holds_a_run(tmp_path)
    in_journal(tmp_path, nothing)
    assert not holds_a_run(tmp_path)
    in_journal(tmp_path, lambda journal: collect(journal, [collected(group) for group in issued_groups([0])]))
    assert holds_a_run(tmp_path)
    (tmp_path / "journal.sqlite").write_bytes(b"no database, but somebody may still want it")
    assert holds_a_run(tmp_path)


def test_a_journal_in_use_is_a_run(tmp_path: Path) -> None:
    async def use(journal) -> None:
        assert holds_a_run(tmp_path)

    in_journal(tmp_path, use)


def test_looking_at_a_journal_keeps_what_a_killed_process_left(tmp_path: Path) -> None:
    """What is in the WAL alone counts, and is still there afterwards."""
    in_journal(tmp_path, nothing)  # the tables are in the file
    left = tmp_path / "left"
    left.mkdir()

    async def use(journal) -> None:
        await collect(journal, [collected(group) for group in issued_groups(range(3))])
        for name in ("journal.sqlite", "journal.sqlite-wal"):
            (left / name).write_bytes((tmp_path / name).read_bytes())

    in_journal(tmp_path, use)
    assert holds_a_run(left)

    async def look(journal) -> None:
        assert (await journal.totals()).groups_issued == 3

    in_journal(left, look)
