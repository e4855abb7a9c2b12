"""The calculator answers an expression of two integers, and ends the episode at anything else."""

import asyncio

import pytest

from minpro_megatron.config.environment import EnvironmentConfig
from minpro_megatron.environments.environment import Answer, EpisodeTurn
from minpro_megatron.environments.registry import make_environment
from minpro_megatron.recipes import products
from minpro_megatron.records import Prompt


def answer_to(text: str) -> Answer | None:
    """By the object that the recipe's import path names."""
    environment = make_environment(EnvironmentConfig(name=products.with_tool().environment.name))
    prompt = Prompt(id="p", source="s", text="347*581=", answer="201607")
    return asyncio.run(environment.answer(EpisodeTurn(prompt, 0, 0, text)))


@pytest.mark.parametrize(
    ("text", "value"), [("347*581", "201607"), ("007*3", "21"), ("3-581", "-578"), ("9+4", "13"), ("48/2", "24")]
)
def test_an_expression_is_answered_with_its_value(text: str, value: str) -> None:
    assert answer_to(text) == Answer(value, tool_calls=1)


@pytest.mark.parametrize("text", ["7/2", "7/0"])
def test_a_division_without_an_integer_is_a_problem(text: str) -> None:
    assert answer_to(text) == Answer("", tool_calls=1, problem=f"{text} is not an integer")


@pytest.mark.parametrize(
    "text", ["", "201607", "347*", "*581", "347*581=", " 347*581", "347*581\n", "3*4*5", "3**5", "1234567890*2", "٣*4"]
)
def test_anything_else_ends_the_episode(text: str) -> None:
    assert answer_to(text) is None
