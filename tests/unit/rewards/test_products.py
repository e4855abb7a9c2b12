"""The task of products: its prompts, its answers, and the grade of the policy's last turn."""

import random

import pytest

from minpro_megatron.rewards import products


def test_a_product_is_worked_as_a_sum_of_its_right_operand() -> None:
    for prompt in ("347*581=", "100*100=", "999*999=", "120*307="):
        left, right = map(int, prompt.removesuffix("=").split("*"))
        assert products.worked(prompt) == str(sum(left for _ in range(right)))


@pytest.mark.parametrize("prompt", ["", "347*581", "347+581=", "347*=", "*581=", "3*4*5=", "-3*4=", "a*b=", "٣*4="])
def test_what_is_no_product_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match=r"prompt: .* is not a product"):
        products.worked(prompt)


def test_drawn_prompts_have_operands_of_three_digits() -> None:
    generator = random.Random(0)
    drawn = [products.draw_prompt(generator) for _ in range(500)]
    operands = [part for prompt in drawn for part in prompt.removesuffix("=").split("*")]
    assert {len(part) for part in operands} == {3}
    assert set("".join(drawn)) == set("0123456789*=")
    assert len(set(drawn)) > 495


def test_the_last_turn_is_the_answer() -> None:
    for response in ("201607", "347*581\n201607", "1\n2\n201607"):
        assert products.grade(response, "201607") == 1.0, response
    for response in ("", "347*581", "201607\n", "201607\n347*581", "347*581\n20160", "347*581\n0201607", " 201607"):
        assert products.grade(response, "201607") == 0.0, response


@pytest.mark.parametrize("answer", ["", "0", "012", "-3", "1.5", "x", "٣", "1234567890"])
def test_an_answer_that_no_product_has_is_an_error(answer: str) -> None:
    with pytest.raises(ValueError, match="answer:"):
        products.grade("7", answer)
