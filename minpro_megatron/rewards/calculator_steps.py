"""The calculator's long task: a meter is turned up and down (`3+4-9=`), and every reading is the answer (`7,0`).

The operations are applied from left to right, and the meter stops at 0 and 9. A response is correct only if all its
readings are, so it is rarely correct by chance, and a correct response can be cut anywhere and continued.
"""

import random

OPERATORS = "+-"
MAX_READING = 9
MAX_OPERAND = 5
NUM_STEPS = 8


def step(reading: int, operator: str, operand: int) -> int:
    """The next reading, 0 to MAX_READING. Raises ValueError for an unknown operator.

    Example: `step(3, "+", 4) == 7`, `step(7, "+", 4) == 9`, `step(3, "-", 5) == 0`.
    """
    if operator == "+":
        return min(reading + operand, MAX_READING)
    if operator == "-":
        return max(reading - operand, 0)
    raise ValueError(f"operator: {operator!r} is not one of {' '.join(OPERATORS)}")


def draw_prompt(generator: random.Random, num_steps: int = NUM_STEPS) -> str:
    """A chain of operations with operands from 1 to MAX_OPERAND. Example: `"3+4-2="` for two steps."""
    first = generator.randint(0, MAX_READING)
    operations = [generator.choice(OPERATORS) + str(generator.randint(1, MAX_OPERAND)) for _ in range(num_steps)]
    return f"{first}{''.join(operations)}="


def operations_of(prompt: str) -> tuple[int, list[tuple[str, int]]]:
    """The first operand, and operator and operand of every step. Raises ValueError if the prompt is not a chain."""
    chain = prompt.removesuffix("=")
    operators, operands = chain[1::2], chain[::2]
    if not (prompt.endswith("=") and len(chain) % 2 and operands.isdigit() and operands.isascii()):
        raise ValueError(f"prompt: {prompt!r} is not a chain of one-digit operands such as 3+4-2=")
    return int(operands[0]), list(zip(operators, map(int, operands[1:]), strict=True))


def worked(prompt: str) -> str:
    """The only correct response: every reading, separated by commas. Raises ValueError if the prompt is not a chain.

    Example: `worked("3+4-9=") == "7,0"`.
    """
    value, operations = operations_of(prompt)
    results = []
    for operator, operand in operations:
        value = step(value, operator, operand)
        results.append(str(value))
    return ",".join(results)


def grade(response_text: str, answer: str) -> float:
    """1.0 if `response_text` is exactly `answer`, all readings with nothing before, between or after them; else 0.0.

    Raises ValueError if `answer` itself is not a list of digits: no response could ever be correct.
    """
    if not all(part.isascii() and part.isdigit() and len(part) == 1 for part in answer.split(",")):
        raise ValueError(f"answer: {answer!r} is not a list of digits such as 7,0; correct the row in the data file")
    return 1.0 if response_text == answer else 0.0
