"""The calculator's long task: its arithmetic, its chains, and a grade for all steps or none."""

import random

import pytest

from minpro_megatron.rewards import calculator_steps


def test_the_meter_stops_at_its_ends() -> None:
    for reading in range(10):
        for operand in range(10):
            clipped = {"+": sorted([0, reading + operand, 9])[1], "-": sorted([0, reading - operand, 9])[1]}
            assert set(clipped) == set(calculator_steps.OPERATORS)
            for operator, value in clipped.items():
                assert calculator_steps.step(reading, operator, operand) == value


def test_a_chain_is_worked_off_from_left_to_right() -> None:
    assert calculator_steps.worked("3+4-9+5=") == "7,0,5"
    assert calculator_steps.operations_of("3+4-9=") == (3, [("+", 4), ("-", 9)])


@pytest.mark.parametrize("prompt", ["", "=", "3+4", "3+=", "3+4x2=", "12+4=", "3+4==", "٣+4="])
def test_what_is_no_chain_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match=r"prompt: .* no chain|operator: "):
        calculator_steps.worked(prompt)


def test_drawn_prompts_are_chains_with_every_operator_and_digit() -> None:
    generator = random.Random(0)
    drawn = [calculator_steps.draw_prompt(generator, 5) for _ in range(200)]
    assert len(set(drawn)) > 195
    assert all(len(calculator_steps.worked(prompt).split(",")) == 5 for prompt in drawn)
    assert set("".join(drawn)) == set("0123456789=") | set(calculator_steps.OPERATORS)


def test_only_all_steps_earn_one() -> None:
    assert calculator_steps.grade("7,8,3", "7,8,3") == 1.0
    for response in ("", "3", "7,8", "7,8,3,", "7,8,3,4", " 7,8,3", "7,8,4", "6,8,3", "7, 8,3"):
        assert calculator_steps.grade(response, "7,8,3") == 0.0, response


@pytest.mark.parametrize("answer", ["", "7,", "7,12", "7, 8", "x", "٣"])
def test_an_answer_that_no_chain_has_is_an_error(answer: str) -> None:
    with pytest.raises(ValueError, match="answer:"):
        calculator_steps.grade("7", answer)
