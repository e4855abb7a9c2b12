"""Make prompt sets (JSON Lines with id, source, prompt, answer) from public data sets.

    python tools/prepare_data.py calculator --input GSM8K_TRAIN.jsonl --output recipes/data

One sub-command per prompt set; the work is in `tools/prompt_sets/`.
"""

import argparse
import sys
from pathlib import Path

from tools.prompt_sets import calculator


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make prompt sets from public data sets.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("calculator", help="two-operand expressions from GSM8K's solutions")
    command.add_argument("--input", type=Path, required=True, help="GSM8K's train.jsonl")
    command.add_argument("--output", type=Path, required=True, help="folder for the two prompt files")
    command.set_defaults(prepare=calculator.prepare)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run one sub-command; 0 on success, 2 after a message about damaged or missing input."""
    options = parse_arguments(arguments)
    try:
        account = options.prepare(options.input, options.output)
    except (ValueError, OSError) as error:
        print(f"prepare_data {options.command}: {error}", file=sys.stderr)
        return 2
    print("\n".join(account))
    return 0


if __name__ == "__main__":
    sys.exit(main())
