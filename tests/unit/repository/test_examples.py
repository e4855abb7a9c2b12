"""The examples of docs/extending.md and docs/episodes.md do what they are examples of."""

import asyncio
import math
from pathlib import Path
from typing import cast

import msgspec
import pytest
import torch

from docs.examples.architecture import NAME, blocks_architecture, blocks_rows
from docs.examples.objective import smooth_cispo
from minpro_megatron.config.environment import EnvironmentConfig
from minpro_megatron.conversion.convert import to_hf, to_megatron
from minpro_megatron.environments.environment import Answer, EpisodeTurn
from minpro_megatron.environments.registry import make_environment
from minpro_megatron.models import architecture
from minpro_megatron.objective.across_ranks.scan import WholeSequenceScan
from minpro_megatron.objective.terms import policy_tokens, summed_loss
from minpro_megatron.records import Prompt
from minpro_megatron.rewards.forms import GroupReward, GroupToGrade, ResponseToGrade, form_of
from minpro_megatron.rewards.judging import judge_group
from minpro_megatron.rewards.registry import load_response_reward, load_reward
from minpro_megatron.weights import table
from tests.support.hf_models import MIXTURE, Watch, assert_same_files, make_model, read_tensors
from tests.support.ragged_tokens import random_tokens


def test_the_objective_is_its_loop_over_tokens() -> None:
    tokens = random_tokens(0, drift=2.0)
    terms = smooth_cispo(tokens.for_objective(torch.float32), {})
    for place, trained in enumerate(tokens.trained):
        if trained:
            weight = 2 * tokens.ratios[place] / (1 + tokens.ratios[place])
            expected = weight * float(tokens.advantages[place])
            assert math.isclose(terms.coefficients_L[place].item(), expected, rel_tol=1e-11, abs_tol=1e-11)


def test_an_objective_gives_a_loss_with_a_gradient_outside_of_a_run() -> None:
    log_probs = torch.tensor([-1.0, -2.0, -0.5, -1.5], requires_grad=True)
    behavior = torch.tensor([-1.2, -1.7, -0.5, -9.0])
    mask = torch.tensor([1.0, 1.0, 1.0, 0.0])
    scan = WholeSequenceScan(torch.tensor([0, 0, 1, 1]), mask)
    tokens = policy_tokens(log_probs, behavior, torch.tensor([1.0, 1.0, -1.0, -1.0]), mask, scan, torch.arange(4))
    loss = summed_loss(log_probs, smooth_cispo(tokens, {}), mask) / mask.sum()
    loss.backward()
    ratios = [math.exp(0.2), math.exp(-0.3), 1.0]
    expected = [-2 * ratio / (1 + ratio) * sign / 3 for ratio, sign in zip(ratios, (1, 1, -1), strict=True)] + [0.0]
    assert log_probs.grad is not None
    torch.testing.assert_close(log_probs.grad, torch.tensor(expected))


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [("3 and 4 give 7", "7", 1.0), ("7.0", "7", 1.0), ("-7", "7", 0.0), ("", "7", 0.0)],
)
def test_a_run_can_grade_with_the_reward(response: str, answer: str, reward: float) -> None:
    assert load_response_reward("docs.examples.reward:grade")(response, answer) == reward


def test_a_run_can_grade_groups_with_the_reward() -> None:
    function = load_reward("docs.examples.reward:grade_group")
    assert form_of(function) == "group"
    responses = [ResponseToGrade(text=text) for text in ("it is 7", "7.2", "8", "")]
    responses.append(ResponseToGrade(text="7", finish_reason="length"))
    group = GroupToGrade(id="p", source="s", prompt="3+4", answer="7", responses=responses)
    assert [one.reward for one in judge_group(cast(GroupReward, function), group)] == [1.0, 0.0, 0.0, 0.0, 0.5]
    tolerant = msgspec.structs.replace(group, metadata={"tolerance": 0.25})
    assert [one.reward for one in judge_group(cast(GroupReward, function), tolerant)] == [1.0, 1.0, 0.0, 0.0, 0.5]


def test_an_environment_answers_turns() -> None:
    environment = make_environment(EnvironmentConfig(name="docs.examples.environment:Guessing"))
    prompt = Prompt(id="p", source="s", text="guess", answer="7")

    def answer_to(text: str) -> Answer | None:
        return asyncio.run(environment.answer(EpisodeTurn(prompt, group_id=0, seed=1, text=text)))

    assert answer_to("2 + 3 is 5") == Answer("too small")
    assert answer_to("12") == Answer("too large")
    assert answer_to("so it is 7") is None
    assert answer_to("I do not know") is None


def test_a_model_of_the_architecture_is_converted_there_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers, tables = architecture._READERS, table._TABLES
    qwen3 = "Qwen3ForCausalLM"
    monkeypatch.setitem(readers, NAME, lambda fields: blocks_architecture(readers[qwen3](fields)))
    rows = [lambda a: blocks_rows([row for part in tables[qwen3] for row in part(a)])]
    monkeypatch.setitem(tables, NAME, rows)
    hf = make_model(tmp_path / "hf", {**MIXTURE, "architectures": [NAME], "intermediate_size": 12})
    assert "blocks.0.self_attn.q_proj.weight" in read_tensors(hf)
    to_megatron(hf, tmp_path / "megatron", Watch(), verify=True)
    to_hf(tmp_path / "megatron", tmp_path / "back", Watch(), verify=True)
    assert_same_files(tmp_path / "back", hf)
