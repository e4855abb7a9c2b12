"""Prompts of the calculator's long task, for training and held out, and its pairs for a warm start.

    python -m minpro_megatron.prompt_sets.calculator_steps recipes/data

The task itself is `minpro_megatron.rewards.calculator_steps`.
"""

import random
from collections.abc import Iterable
from pathlib import Path

from minpro_megatron.command_line import Parser
from minpro_megatron.prompt_sets import rows
from minpro_megatron.prompt_sets.calculator import is_held_out
from minpro_megatron.rewards import calculator_steps

TRAIN_FILE, HELDOUT_FILE = "calculator_steps_train.jsonl", "calculator_steps_heldout.jsonl"
NUM_PROMPTS = 96  # of each file
NUM_SYNTHETIC = 50_000


def draw(count: int, seed: int, held_out: bool) -> list[str]:
    """`count` different prompts of one of the two sets. The prompt alone decides to which set it belongs."""
    generator, drawn = random.Random(seed), {}
    while len(drawn) < count:
        prompt = calculator_steps.draw_prompt(generator)
        if is_held_out(prompt) is held_out:
            drawn[prompt] = None
    return list(drawn)


def synthetic_pairs(heldout: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Many prompts of the training set with their correct responses; none of `heldout` is among them."""
    excluded = {prompt for prompt, _ in heldout}
    pairs = [(prompt, calculator_steps.worked(prompt)) for prompt in draw(NUM_SYNTHETIC, 0, held_out=False)]
    assert not any(prompt in excluded for prompt, _ in pairs), "a held-out prompt of the training side"
    return pairs


def spoiled(pair: tuple[str, str], wrong_share: float, generator: random.Random) -> tuple[str, str]:
    """The pair with each reading replaced by another with probability `wrong_share`; the chain continues from it."""
    prompt, _ = pair
    reading, operations = calculator_steps.operations_of(prompt)
    readings = []
    for operator, operand in operations:
        reading = calculator_steps.step(reading, operator, operand)
        if generator.random() < wrong_share:
            other = generator.randrange(calculator_steps.MAX_READING)
            reading = other if other < reading else other + 1
        readings.append(str(reading))
    return prompt, ",".join(readings)


def _rows(prompts: Iterable[str]) -> list[dict[str, str]]:
    return [
        {
            "id": f"calculator-steps-{prompt.removesuffix('=')}",
            "source": "calculator-steps",
            "prompt": prompt,
            "answer": calculator_steps.worked(prompt),
        }
        for prompt in prompts
    ]


def prepare(output_folder: Path) -> None:
    """Writes both files; the content is always the same."""
    for name, held_out in ((TRAIN_FILE, False), (HELDOUT_FILE, True)):
        # a different seed from the synthetic pairs': the warm start sees hardly any of these prompts
        rows.write_prompts(output_folder / name, _rows(draw(NUM_PROMPTS, 1, held_out)))


if __name__ == "__main__":
    parser = Parser(description="Make the prompts of the calculator's long task.")
    parser.add_argument("output", type=Path, help="folder for the two prompt files")
    prepare(parser.parse_args().output)
