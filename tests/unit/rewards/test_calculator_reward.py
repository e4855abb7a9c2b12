"""The calculator task's arithmetic and its grading."""

from fractions import Fraction

import pytest

from minpro_megatron.rewards import calculator


@pytest.mark.parametrize(("response", "answer"), [("24", "24"), ("0", "0"), ("-7", "-7"), ("10", "10")])
def test_the_exact_integer_earns_one(response: str, answer: str) -> None:
    assert calculator.grade(response, answer) == 1.0


@pytest.mark.parametrize(
    "response",
    ["", "2", "42", "-24", "+24", "024", "24 ", " 24", "24\n", "24.0", "24=", "2 4", "24<eos>", "٢٤", "24" * 1000],
)
def test_anything_else_earns_nothing(response: str) -> None:
    assert calculator.grade(response, "24") == 0.0


def test_minus_zero_is_not_zero() -> None:
    assert calculator.grade("-0", "0") == 0.0


@pytest.mark.parametrize("answer", ["", "024", "-0", "24 ", "2.5", "x", "9" * 13, "24\n"])
def test_an_answer_no_response_could_match_is_an_error(answer: str) -> None:
    with pytest.raises(ValueError, match="answer:"):
        calculator.grade("24", answer)


def test_evaluate_agrees_with_rational_arithmetic() -> None:
    for left in range(40):
        for right in range(40):
            exact = {
                "+": Fraction(left) + right,
                "-": Fraction(left) - right,
                "*": Fraction(left) * right,
                "/": Fraction(left, right) if right else None,
            }
            for operator, value in exact.items():
                expected = int(value) if value is not None and value.denominator == 1 else None
                assert calculator.evaluate(left, operator, right) == expected, (left, operator, right)


def test_evaluate_rejects_an_unknown_operator() -> None:
    with pytest.raises(ValueError, match="operator"):
        calculator.evaluate(1, "^", 2)


def test_all_expressions_are_distinct_and_within_the_limits() -> None:
    pairs = list(calculator.all_expressions())
    assert len({prompt for prompt, _ in pairs}) == len(pairs) > 1000
    assert all(calculator.grade(answer, answer) == 1.0 for _, answer in pairs)
    largest = str(calculator.MAX_OPERAND)
    assert (f"{largest}+0=", largest) in pairs
    assert f"{largest}+1=" not in dict(pairs)
    assert "1-2=" not in dict(pairs)
