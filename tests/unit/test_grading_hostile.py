"""Expressions made to take for ever: refused, or left to the limits of the grading process; never evaluated as code."""

import asyncio
import time
from pathlib import Path

import pytest
from sympy.parsing import sympy_parser

from minpro_megatron.rewards import symbolic
from minpro_megatron.rewards.mathematics import grade
from minpro_megatron.rewards.pool import RewardPool

LIMIT_S = 5.0  # collector.reward_timeout_s, of processor time: other processes may hold the machine
HOSTILE = {
    "tower": "9**9**9**9",
    "tower in LaTeX": "9^{9^{9^{9}}}",
    "huge power": "10^{10^{10}}",
    "power of a sum": "(x+y+z+1)^{5000}",
    "root of a tower": r"\sqrt{9^{9^{9^9}}}",
    "exponent of a numeral": "1e999999999",
    "factorials": "9!!!!",
    "factorials of factorials": "5" + "!" * 40,
    "factorial of a power": "(10^9)!",
    "binomial": r"\binom{10^{9}}{10^{8}}",
    "gamma": r"\Gamma(10^{9})",
    "sum": r"\sum_{n=1}^{10^9} n",
    "integral": r"\int_0^1 e^{-x^2} dx",
    "matrix": r"\operatorname{eye}(10^9)",
    "parentheses": "(" * 400 + "1" + ")" * 400,
    "parentheses as deep as allowed": "(x+" * 11 + "1" + ")" * 11,
    "fractions": r"\frac{1}{" * 200 + "1" + "}" * 200,
    "roots": r"\sqrt{" * 150 + "2" + "}" * 150,
    "a megabyte of digits": "9" * 2**20,
    "as many digits as are looked at": "9" * 900,
    "a megabyte of spaces": "1" + " " * 2**20 + "2",
    "dollars": "$" * 2**20,
    "answers": "Answer: " * 2**17,
    "open boxes": r"\boxed{" * 2**17,
    "open braces": "{" * 900,
    "bars": "|x" * 300,
    "signs": "-" * 400 + "1",
    "text in text": r"\text{" * 150,
    "list": ",".join("x" for _ in range(400)),
    "control characters": "\x00\x1b[2J\u202e" * 90,
}


@pytest.mark.parametrize("answer", ["7", "x^{2}+1", "(1,2)"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_expressions_end_within_the_limit(name: str, answer: str) -> None:
    start = time.process_time()
    assert grade(f"Answer: {HOSTILE[name]}", answer).reward == 0.0
    assert time.process_time() - start < LIMIT_S


@pytest.mark.parametrize("latex", ["9^{9^{9^{9}}}", "(10^{9})!", "(2^{100000})^{2}"])
def test_values_of_too_many_digits_are_refused_before_they_are_computed(latex: str) -> None:
    with pytest.raises(symbolic.RefusedError):
        symbolic.equal(latex, "7")


@pytest.mark.parametrize(
    "code", ["__import__('os')", "Integer (1 ).__class__", "Symbol ('x' )", "Integer (1 )+Integer (1 )", "open", ""]
)
def test_sympy_evaluates_no_text(code: str) -> None:
    with pytest.raises(ValueError, match="may not be evaluated"):
        sympy_parser.eval_expr(code, {}, {})
    assert sympy_parser.eval_expr("Integer (12 )", {}, {}) == 12


def test_no_response_runs_code(tmp_path: Path) -> None:
    path = tmp_path / "touched"
    for call in (f'__import__("pathlib").Path("{path}").touch()', f"open('{path}','w')"):
        for text in (call, f"\\max({call}, 2)", f"\\operatorname{{{call}}}(1)", f"f({call})", f"{{{call}}}^2"):
            grade(f"Answer: {text}", "f(2)")
    assert not path.exists()


async def rewards_of(pool: RewardPool, texts: list[str], source: str) -> list[float | None]:
    return [judged.reward for judged in await pool.judge_all(texts, "1", source)]


def test_what_exceeds_the_limits_costs_its_response_only() -> None:
    async def main() -> None:
        rewards = {"spin": "tests.unit.hostile_rewards:spin", "hog": "tests.unit.hostile_rewards:hog"}
        async with RewardPool("calculator", 1, 0.3, by_source=rewards) as pool:
            assert await rewards_of(pool, ["1", "2"], "plain") == [1.0, 0.0]
            (judged,) = await pool.judge_all(["1"], "1", "spin")
            assert judged.reward is None
            assert judged.problem == "grader exceeded collector.reward_timeout_s = 0.3 s of processor time"
            assert await rewards_of(pool, ["1"], "plain") == [1.0]
            assert await rewards_of(pool, ["small", "large", "small"], "hog") == [1.0, None, 1.0]
            assert (pool.num_timed_out, pool.num_failed) == (1, 1)

    asyncio.run(main())
