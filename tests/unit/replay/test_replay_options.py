"""What a replay's options become, and what is refused before any rank starts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minpro_megatron.config.mesh_option import parse_parallel
from minpro_megatron.config.run import RunConfig, parse_run_config
from minpro_megatron.errors import UserError
from minpro_megatron.replay.batches import replay_batches
from minpro_megatron.replay.run import checked_replay
from minpro_megatron.replay.settings import ReplayOptions, replay_config
from tests.support.replay_options import OPTIONS, options
from tests.support.replay_rows import GOOD, write_rows
from tests.support.rollout_fakes import run_config

__all__ = ["options"]  # a fixture

KEPT = {"kept_ids": [[3, 5], [76], [0, 7]]}


def with_sampling(sampling: dict[str, Any]) -> RunConfig:
    settings = run_config(Path("runs")).model_dump()
    settings["sampling"] |= sampling
    return parse_run_config(settings)


def with_run(options: ReplayOptions, **sampling: Any) -> ReplayOptions:
    """The options with the folder of a run with these sampling settings."""
    run = options.output.with_name("run")
    run.mkdir()
    (run / "run.json").write_text(with_sampling(sampling).to_json())
    return replace(options, run=run)


def test_without_options_the_papers_numbers_hold():
    config = replay_config(OPTIONS, num_gpus=0)
    assert config.objective.model_dump() == {
        "name": "minpro", "aggregation": "token_mean", "clip_low": 1.0, "clip_high": 4.0
    }  # fmt: skip
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.clip_grad) == (1e-6, 0.1, 1.0)
    assert (optimizer.beta1, optimizer.beta2, optimizer.epsilon) == (0.9, 0.999, 1e-8)
    assert config.sampling.temperature == 1.0
    assert (config.parallel.world_size, config.device, config.model.dtype) == (1, "cpu", "float32")


def test_options_and_settings_reach_the_policy():
    settings = ["clip_high=3.5", "objective.clip_low=0.5", "loss.kl.enabled=true", "sampling.temperature=0.7"]
    given = {"device": "cpu", "optimizer.learning_rate": 1e-3, "optimizer.clip_grad": 7.0, "batch.packing": False}
    config = replay_config(replace(OPTIONS, settings=settings, given=given | {"seed": 5}), num_gpus=0)
    assert config.objective.model_dump()["clip_high"] == 3.5
    assert config.objective.model_dump()["clip_low"] == 0.5
    assert config.loss.kl.enabled
    assert (config.batch.packing, config.seed) == (False, 5)
    assert (config.sampling.temperature, config.optimizer.learning_rate, config.optimizer.clip_grad) == (0.7, 1e-3, 7)


@pytest.mark.parametrize(("num_gpus", "device", "dtype"), [(0, "cpu", "float32"), (2, "cuda", "bfloat16")])
def test_it_computes_on_gpus_where_every_rank_has_one(num_gpus, device, dtype):
    config = replay_config(replace(OPTIONS, given={}, parallel="tensor=2"), num_gpus)
    assert (config.device, config.model.dtype) == (device, dtype)
    assert replay_config(replace(OPTIONS, given={}, parallel="tensor=4"), num_gpus).device == "cpu"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"objective": "dapo"}, "^--objective = 'dapo': .*known: minpro, cispo"),
        ({"settings": ["clip=4"]}, r"no setting 'clip' \(did you mean clip_low or clip_high\?\); known: aggregation, "),
        ({"settings": ["clip_high"]}, "expected section.key=value"),
        ({"settings": ["clip_high=-1"]}, "clip_high: Input should be greater than or equal to 0"),
        ({"settings": ["clip_high=NaN"]}, "clip_high: Input should be a finite number"),
        ({"objective": "minpr"}, r"^--objective = 'minpr': there is no such objective \(did you mean minpro\?\)"),
        ({"settings": ["name=grpo"]}, "choose the objective with --objective"),
        ({"settings": ["staleness.delay_steps=3"]}, "no effect in a replay; known: .* loss.*"),
        ({"settings": ["optimizer.warmup_global_steps=3"]}, "constant"),
        ({"settings": ["optimizer.schedule=linear"]}, "constant"),
        ({"settings": ["loss.kl.enable=true"]}, "no setting 'enable'"),
        ({"given": {"optimizer.clip_grad": -1.0}}, "^--clip-grad: Input should be greater than or equal to 0"),
        ({"given": {"seed": -1}}, "^--seed: Input should be greater than or equal to 0"),
        ({"parallel": "tensors=2"}, r"no axis 'tensors' \(did you mean tensor.*; known: tensor, pipeline, "),
        ({"parallel": "tensor=2,tensor=2"}, "tensor is given twice"),
        ({"parallel": "tensor=two"}, "tensor needs a whole number"),
        ({"parallel": "tensor"}, "tensor needs a whole number"),
        ({"parallel": "pipeline=2,pipeline_layers=3+x"}, "pipeline_layers needs whole numbers, such as"),
        ({"parallel": "pipeline=2,pipeline_layers=3+2+1"}, "3 numbers for pipeline x virtual_pipeline = 2 x 1 = 2"),
        ({"parallel": "tensor=0"}, "--parallel tensor: Input should be greater than or equal to 1"),
        ({"parallel": "expert=2,data=1"}, "must divide tensor x context x data"),
        ({"given": {"device": "cpu", "model.dtype": "bfloat16"}}, "--dtype = bfloat16 needs --device = cuda"),
        ({"given": {"device": "cuda"}, "parallel": "data=4"}, "4 ranks need a GPU each, 1 are visible"),
    ],
    ids=str,
)
def test_a_bad_option_is_refused(change, problem):
    with pytest.raises(UserError, match=problem) as raised:
        replay_config(replace(OPTIONS, **change), num_gpus=1)
    assert len(raised.value.problems) == 1


def test_parallel_takes_every_axis_in_any_order():
    assert parse_parallel("") == {}
    text = "data=1, expert=2,tensor=2,pipeline=1,context=2,virtual_pipeline=1,expert_tensor=2,pipeline_layers=3,"
    assert parse_parallel(text) == {
        "data": 1, "expert": 2, "tensor": 2, "pipeline": 1, "context": 2, "virtual_pipeline": 1, "expert_tensor": 2,
        "pipeline_layers": [3],
    }  # fmt: skip
    assert parse_parallel("pipeline=3,pipeline_layers=10 + 2+1")["pipeline_layers"] == [10, 2, 1]


def test_checked_options_say_what_the_ranks_will_do(options):
    config, rows = checked_replay(replace(options, parallel="tensor=2,context=2"))
    assert (len(rows.rollouts), rows.groups_per_batch, rows.updates) == (3, None, 1)
    assert config.batch.max_tokens_per_row == 4096
    assert checked_replay(replace(options, mini_batch_groups=2, updates=5))[1].updates == 5
    assert checked_replay(replace(options, mini_batch_groups=2))[1].updates == 2


def test_a_mini_batch_without_a_trained_token_is_refused_if_an_update_uses_it(options):
    with pytest.raises(UserError, match=r"every token of mini-batch 2 of 3 is masked \(lines 2 to 2\)"):
        checked_replay(replace(options, mini_batch_groups=1))
    assert checked_replay(replace(options, mini_batch_groups=1, updates=1))[1].updates == 1


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model": Path("/nowhere")}, "--model /nowhere: there is no such folder"),
        ({"rollouts": Path("/nowhere.jsonl")}, "--rollouts /nowhere.jsonl: No such file"),
        ({"parallel": "tensor=8"}, "--parallel tensor = 8 must divide the model's num_attention_heads = 4"),
        ({"parallel": "expert=2"}, "has no experts"),
        (
            {"given": {"batch.max_tokens_per_row": 4}},
            "line 1: prompt_ids and response_ids are 5 tokens, 5 with",
        ),
        ({"settings": ["loss.icepop.enabled=true"]}, "line 1: rollout_log_probs"),
    ],
    ids=str,
)
def test_what_does_not_fit_together_is_refused(options, change, problem):
    with pytest.raises(UserError, match=problem):
        checked_replay(replace(options, **change))


def test_a_row_longer_than_the_model_is_refused_with_its_line(options):
    config = json.loads((options.model / "config.json").read_text())
    (options.model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4}))
    match = (
        r"line 1: prompt_ids and response_ids are \d+ tokens, more than max_position_embeddings = 4 in .*config.json"
    )
    with pytest.raises(UserError, match=match):
        checked_replay(options)


def test_missing_weights_are_refused(options):
    (options.model / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no \*.safetensors file"):
        checked_replay(options)


def test_only_a_former_output_is_overwritten(options):
    output = options.output
    output.mkdir()
    checked_replay(options)  # empty
    (output / "summary.json").touch()
    with pytest.raises(UserError, match=r"summary.json is not from an earlier output"):  # a training run's, for one
        checked_replay(options)
    (output / "tokens.jsonl").touch()
    checked_replay(options)
    (output / "notes.txt").touch()  # stays
    checked_replay(options)
    (output / "model").mkdir()
    (output / "model" / "card.md").touch()
    with pytest.raises(UserError, match=r"--output .*model: it holds files that this program did not write there"):
        checked_replay(options)
    with pytest.raises(UserError, match="it is not a folder"):
        checked_replay(replace(options, output=output / "notes.txt"))


def test_the_overlong_penalty_has_the_sampling_runs_limit(options):
    settings = ["loss.overlong_penalty.enabled=true", "loss.overlong_penalty.buffer_tokens=4"]
    penalized = replace(options, settings=[*settings, "sampling.max_response_tokens=5"])
    config, rows = checked_replay(penalized)
    [batch] = replay_batches(rows.rollouts, None, config.loss, config.sampling.max_response_tokens)
    assert config.sampling.max_response_tokens == 5
    assert [sequence.advantage for sequence in batch.sequences] == [0, 0, 0]
    with pytest.raises(UserError, match=r"must not exceed sampling.max_response_tokens = 3"):
        checked_replay(replace(penalized, settings=[*settings, "sampling.max_response_tokens=3"]))


def test_a_runs_sampling_settings_are_the_replays(options):
    options = with_run(options, temperature=0.7, top_k=5, top_p=0.9, max_response_tokens=40)
    write_rows(options.rollouts, GOOD | KEPT, GOOD | KEPT | {"group": "b"})
    config, rows = checked_replay(
        replace(options, settings=["loss.overlong_penalty.enabled=true", "loss.overlong_penalty.buffer_tokens=8"])
    )
    sampling = config.sampling
    assert (sampling.temperature, sampling.top_k, sampling.max_response_tokens) == (0.7, 5, 40)
    assert rows.rollouts[0].supports is not None
    checked_replay(replace(options, settings=["sampling.temperature=0.7", "sampling.top_k=5"]))  # the same once more


@pytest.mark.parametrize(
    ("sampling", "settings", "row", "problem"),
    [
        ({"top_k": 5}, [], {}, "ROWS: line 1: kept_ids: the field is missing (sampling.top_k of --run RUN needs it)"),
        (
            {},
            [],
            KEPT,
            "ROWS: line 1: kept_ids: the response was sampled with sampling.top_k; that of --run RUN is 0; give",
        ),
        (
            {"top_k": 5},
            ["sampling.top_k=6"],
            KEPT,
            "--set sampling.top_k=6: --run RUN has sampling.top_k = 5, with which",
        ),
        (
            {},
            ["sampling.temperature=0.5"],
            {},
            "--set sampling.temperature=0.5: --run RUN has sampling.temperature = 1.0",
        ),
        (
            {"max_response_tokens": 2},
            [],
            {},
            "ROWS: line 1: response_ids has 3 tokens, more than sampling.max_response_tokens = 2 of --run RUN; give",
        ),
        (
            {"max_prompt_tokens": 1},
            [],
            {},
            "ROWS: line 1: prompt_ids has 2 tokens, more than sampling.max_prompt_tokens = 1 of --run RUN; give",
        ),
        (
            {"top_k": 2},
            [],
            {"kept_ids": [list(range(73)), [76], [0]]},
            "ROWS: line 1: kept_ids has 73 ids at a token, more than 72, the most for sampling.top_k = 2 of --run RUN",
        ),
    ],
)
def test_rows_and_settings_of_other_runs_are_refused(options, sampling, settings, row, problem):
    options = with_run(options, **sampling)
    write_rows(options.rollouts, GOOD | row)
    with pytest.raises(UserError) as raised:
        checked_replay(replace(options, settings=settings))
    (found,) = raised.value.problems
    expected = problem.replace("RUN", str(options.run)).replace("ROWS", str(options.rollouts))
    assert found.startswith(expected)


def test_a_run_folder_without_settings_is_named(options, tmp_path):
    with pytest.raises(
        UserError, match=r"^--run .*none/run\.json: No such file or directory; give the folder of a run"
    ):
        checked_replay(replace(options, run=tmp_path / "none"))
