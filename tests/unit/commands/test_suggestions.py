"""A name that is not among those that an option, a setting or a command permits: the message has the similar ones."""

import pytest

from minpro_megatron.__main__ import main
from minpro_megatron.command_line import did_you_mean
from minpro_megatron.config.run import with_overrides
from minpro_megatron.errors import UserError
from minpro_megatron.planning.gpus import GPU_KINDS, gpu_kind
from minpro_megatron.recipes.demo import tiny_moe
from minpro_megatron.rewards.registry import check_reward_name


@pytest.mark.parametrize(
    ("given", "known", "hint"),
    [
        ("h100", ["h200-141gb", "h100-80gb"], " (did you mean h100-80gb?)"),
        ("H100-80GB", ["h200-141gb", "h100-80gb"], " (did you mean h100-80gb?)"),
        ("clip", ["clip_low", "clip_high", "name"], " (did you mean clip_low or clip_high?)"),
        ("lanch", ["launch", "logs"], " (did you mean launch?)"),
        ("b", ["b300", "beta"], ""),  # too short to say anything
        ("nothing", ["h100-80gb"], ""),
        ("any", [], ""),
    ],
)
def test_the_hint_has_the_longer_names_and_then_the_similar_ones(given: str, known: list[str], hint: str) -> None:
    assert did_you_mean(given, known) == hint


@pytest.mark.parametrize(
    ("arguments", "suggested"),
    [
        (["plan", "recipes.demo:tiny_moe", "--gpu", "h100"], "h100-80gb"),
        (["prepare", "dapoo"], "dapo"),
        (["convert", "to-megatrn"], "to-megatron"),
        (["eval", "--output", "x", "--engine", "sglan"], "sglang"),
        (["replay", "--device", "cudaa"], "cuda"),
        (["show", "runs/demo", "--state", "score"], "scored"),
        (["tiny-model", "--task", "calculater"], "calculator"),
    ],
)
def test_an_option_with_choices_lists_and_suggests_them(
    arguments: list[str], suggested: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"(did you mean {suggested}" in line
    assert "; known: " in line


@pytest.mark.parametrize(
    ("override", "suggested"),
    [
        ("staleness.mode=delai", "delay"),
        ("device=CUDA", "cuda"),
        ("objective.name=minpr", "minpro\\?\\); known: minpro, cispo"),
        ("objective.aggregation=tokens_mean", "token_mean"),
        ('model.recompute_modules=["mooe_act"]', "moe_act"),
    ],
)
def test_a_setting_with_a_list_of_values_suggests_them(override: str, suggested: str) -> None:
    with pytest.raises(UserError, match=rf"\(did you mean {suggested}"):
        with_overrides(tiny_moe(), [override])


def test_gpus_and_rewards_suggest_names() -> None:
    with pytest.raises(UserError, match="did you mean a100-80gb"):
        gpu_kind("a100")
    assert gpu_kind("h100-80gb") is GPU_KINDS["h100-80gb"]
    with pytest.raises(UserError, match=r"--reward = 'dapo_box'.*did you mean dapo_boxed"):
        check_reward_name("dapo_box", "--reward")
