"""Prompts of the task of products, for training and held out, and its pairs for a warm start.

    python -m minpro_megatron.prompt_sets.products recipes/data

The task itself is `minpro_megatron.rewards.products`.
"""

import random
from pathlib import Path

from minpro_megatron.command_line import Parser
from minpro_megatron.prompt_sets import rows
from minpro_megatron.prompt_sets.calculator import is_held_out
from minpro_megatron.rewards import products

TRAIN_FILE, HELDOUT_FILE = "products_train.jsonl", "products_heldout.jsonl"
NUM_TRAIN, NUM_HELDOUT = 512, 96
NUM_SYNTHETIC = 50_000

END = "<eos>"  # the token that ends a turn
# What the policy reads between its call and its answer: its own end of turn, the result between two markers.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' -%}{{ message.content }}{{ eos_token }}"
    "{%- elif message.role == 'tool' -%}:{{ message.content }}="
    "{%- else -%}{{ message.content }}{%- endif -%}"
    "{%- endfor -%}"
)


def draw(count: int, seed: int, held_out: bool) -> list[str]:
    """`count` different prompts of one of the two sets. The prompt alone decides to which set it belongs."""
    generator, drawn = random.Random(seed), {}
    while len(drawn) < count:
        prompt = products.draw_prompt(generator)
        if is_held_out(prompt) is held_out:
            drawn[prompt] = None
    return list(drawn)


def synthetic_pairs(heldout: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """For many prompts of the training set the three turns that the model knows at first, as (what it reads, what it
    writes): the answer at once, the call of the calculator, and the answer after the result. None is of `heldout`."""
    excluded = {prompt for prompt, _ in heldout}
    pairs = []
    for prompt in draw(NUM_SYNTHETIC, 0, held_out=False):
        assert prompt not in excluded, "a held-out prompt of the training side"
        call, answer = prompt.removesuffix("="), products.worked(prompt)
        pairs += [(prompt, answer), (prompt, call), (f"{prompt}{call}{END}:{answer}=", answer)]
    return pairs


def spoiled(pair: tuple[str, str], wrong_share: float, generator: random.Random) -> tuple[str, str]:
    """The pair with one digit replaced in the fraction `wrong_share` of all calls and copied results. An answer at once
    stays right: so much of multiplication as the model can learn, it shall know."""
    read, written = pair
    at_once = END not in read and "*" not in written
    if at_once or generator.random() >= wrong_share:
        return pair
    place = generator.choice([index for index, character in enumerate(written) if character.isdigit()])
    other = generator.choice([digit for digit in "0123456789" if digit != written[place]])
    return read, f"{written[:place]}{other}{written[place + 1 :]}"


def _rows(prompts: list[str]) -> list[dict[str, str]]:
    return [
        {
            "id": f"products-{prompt.removesuffix('=')}",
            "source": "products",
            "prompt": prompt,
            "answer": products.worked(prompt),
        }
        for prompt in prompts
    ]


def prepare(output_folder: Path) -> None:
    """Writes both files; the content is always the same."""
    for name, count, held_out in ((TRAIN_FILE, NUM_TRAIN, False), (HELDOUT_FILE, NUM_HELDOUT, True)):
        # a different seed from the synthetic pairs': the warm start sees hardly any of these prompts
        rows.write_prompts(output_folder / name, _rows(draw(count, 1, held_out)))


if __name__ == "__main__":
    parser = Parser(description="Make the prompts of the task of products.")
    parser.add_argument("output", type=Path, help="folder for the two prompt files")
    prepare(parser.parse_args().output)
