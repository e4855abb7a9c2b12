"""Calculator prompts from the annotations in GSM8K's solutions, such as `<<48/2=24>>`.

The limits of the task (operands, answers, exact division) are in `minpro_megatron.rewards.calculator`.
"""

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from minpro_megatron.prompt_sets import rows
from minpro_megatron.rewards import calculator

TRAIN_FILE = "calculator_train.jsonl"
HELDOUT_FILE = "calculator_heldout.jsonl"

# One expression in five is held out.
HELDOUT_MODULUS = 5

_ANNOTATION = re.compile(r"<<(.*?)>>")
_NUMBER = "(0|[1-9][0-9]*)"
_EXPRESSION = re.compile(rf"{_NUMBER}([-+*/]){_NUMBER}=(-?[0-9]+)")


@dataclass(frozen=True)
class Extraction:
    """The kept expressions (`"48/2"`) with their answers (`"24"`), and the number of annotations for each outcome."""

    answers: dict[str, str]
    counts: Counter[str]


def extract(path: Path) -> Extraction:
    """Read the calculator annotations of a GSM8K file.

    Every annotation is counted once in `counts`, under `kept` or under the reason it was dropped.
    Raises rows.DamagedRow for rows that are not complete GSM8K rows.
    """
    answers: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for row_number, row in rows.read_jsonl(path):
        solution = rows.text_field(path, row_number, row, "answer")
        if "\n#### " not in solution:
            rule = "must end with a line '#### <final answer>'; is the solution cut off?"
            raise rows.DamagedRow(path, row_number, "answer", rule)
        for annotation in _ANNOTATION.findall(solution):
            reason, expression, answer = _classify(annotation)
            if reason == "kept" and expression in answers:
                reason = "dropped: seen before"
            counts[reason] += 1
            if reason == "kept":
                answers[expression] = answer
    return Extraction(answers, counts)


def _classify(annotation: str) -> tuple[str, str, str]:
    """`("kept", expression, answer)`, or the reason for dropping the annotation and two empty texts."""
    match = _EXPRESSION.fullmatch(annotation)
    if match is None:
        return "dropped: not one operation on two whole numbers", "", ""
    left, operator, right, stated = int(match[1]), match[2], int(match[3]), int(match[4])
    answer = calculator.evaluate(left, operator, right)
    if answer is None or answer != stated:
        return "dropped: the stated result is wrong", "", ""
    if not calculator.within_limits(left, right, answer):
        return "dropped: outside the limits of the task", "", ""
    return "kept", f"{left}{operator}{right}", str(answer)


def is_held_out(expression: str) -> bool:
    """True for the fifth of all expressions that is never trained on.

    It depends only on the expression, so adding, removing or reordering rows moves no expression between sets.
    """
    digest = hashlib.sha256(expression.encode("ascii")).digest()
    return int.from_bytes(digest[:8], "big") % HELDOUT_MODULUS == 0


def prompt_row(expression: str, answer: str) -> dict[str, str]:
    """The prompt row of one expression: `{"id": "calculator-48/2", "source": ..., "prompt": "48/2=", ...}`."""
    return {"id": f"calculator-{expression}", "source": "calculator", "prompt": f"{expression}=", "answer": answer}


def prepare(input_path: Path, output_folder: Path) -> list[str]:
    """Write `calculator_train.jsonl` and `calculator_heldout.jsonl`; returns the lines of a short summary."""
    extraction = extract(input_path)
    train, heldout = [], []
    for expression, answer in extraction.answers.items():
        (heldout if is_held_out(expression) else train).append(prompt_row(expression, answer))
    rows.write_prompts(output_folder / TRAIN_FILE, train)
    rows.write_prompts(output_folder / HELDOUT_FILE, heldout)
    lines = [f"{extraction.counts.total():6d} annotations in {input_path.name}"]
    lines += [f"{count:6d} {reason}" for reason, count in extraction.counts.most_common()]
    lines += [f"{len(train):6d} prompts in {TRAIN_FILE}", f"{len(heldout):6d} prompts in {HELDOUT_FILE}"]
    return lines
