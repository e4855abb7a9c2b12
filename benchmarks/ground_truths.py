"""The true answers of the mathematics benchmarks, other spellings of each, and wrong ones.

    python -m benchmarks.ground_truths --data DIR --output tests/unit/rewards/grading_truths.jsonl

writes each different answer once, as `{"data_source": ..., "ground_truth": ...}`. The seven files are aime24.jsonl,
aime25.parquet, amc23.jsonl, gsm8k_test.jsonl, minerva_math.jsonl, olympiadbench.jsonl and aime24_dapo_schema.parquet;
gsm8k_train.jsonl is read beside them, MATH-500 where there is a math500.jsonl with a field `answer`.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow.parquet

from minpro_megatron.rewards.extraction import last_boxed

Row = dict[str, Any]


def _ground_truth(row: Row) -> str:
    return row["reward_model"]["ground_truth"]


def _answer(row: Row) -> str:
    return str(row["answer"])


# file -> (data source, the true answer of a row)
FILES: dict[str, tuple[str, Callable[[Row], str]]] = {
    "aime24.jsonl": ("aime24", _answer),
    "aime24_dapo_schema.parquet": ("math_dapo", _ground_truth),
    "aime25.parquet": ("aime25", _ground_truth),
    "amc23.jsonl": ("amc23", _answer),
    "gsm8k_test.jsonl": ("gsm8k", lambda row: row["answer"].rpartition("#### ")[2]),
    "gsm8k_train.jsonl": ("gsm8k", lambda row: row["answer"].rpartition("#### ")[2]),
    "minerva_math.jsonl": ("minerva_math", lambda row: (last_boxed(row["solution"]) or "").strip()),
    "olympiadbench.jsonl": ("olympiadbench", lambda row: row["final_answer"][0]),
    "math500.jsonl": ("math500", _answer),
}


def read_rows(path: Path) -> list[Row]:
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_truths(folder: Path) -> list[tuple[str, str]]:
    """(data source, true answer) of every row of the files that are there."""
    return [
        (source, answer_of(row))
        for name, (source, answer_of) in FILES.items()
        if (folder / name).is_file()
        for row in read_rows(folder / name)
    ]


def renderings(truth: str) -> list[str]:
    """Responses that give `truth`, at least four."""
    bare = _bare(truth)
    responses = [
        f"So we are done.\nAnswer: {truth}",
        f"Hence the answer is $\\boxed{{{bare}}}$.",
        f"First we add.\n\n**Answer:** ${bare}$",
    ]
    return responses + [f"Answer: {spelling}" for spelling in _spellings(bare)]


def _bare(truth: str) -> str:
    return " ".join(truth.replace("$", "").split()).rstrip(".")


def _spellings(bare: str) -> Iterator[str]:
    """Equivalent spellings of an answer."""
    if re.fullmatch(r"[+-]?(\d+|\d{1,3}(,\d{3})+)(\.0)?", bare):
        yield from _integer_spellings(bare)
    elif match := re.fullmatch(r"(-?)\\frac\{(-?\d+)\}\{(\d+)\}", bare):
        value = Fraction(int(match[2]), int(match[3])) * (-1 if match[1] else 1)
        yield f"${match[1]}\\dfrac{{{match[2]}}}{{{match[3]}}}$"
        yield f"{value.numerator}/{value.denominator}"
        yield f"x = {value.numerator * 3}/{value.denominator * 3}"
        if value.denominator in (2, 4, 5, 8, 10, 16, 20, 25):
            yield str(float(value))
    elif re.fullmatch(r"-?\d*\.\d+", bare):
        yield f"{bare}0"
        yield f"\\( {Fraction(bare)} \\)"
    elif match := re.fullmatch(r"(-?[\d.]+)e(-?\d+)", bare):
        yield f"${match[1]} \\times 10^{{{match[2]}}}$"
        yield f"{match[1]}E{match[2]}"
    else:
        yield f"\\[ {_respelled(bare)} \\]"
        yield f"$$\n{_respelled(bare)}\n$$"
        if _is_value(bare):
            yield f"$\\frac{{2({bare})}}{{2}}$"  # only algebra can tell


def _integer_spellings(bare: str) -> Iterator[str]:
    number = int(float(bare.replace(",", "")))
    yield f"{number:,}"
    yield f"{number}.0"
    yield f"${number}$ meters."
    yield f"\\text{{{number}}}"
    yield f"{number * 2}/2"


def _is_value(bare: str) -> bool:
    """One formula: no equation, list, interval or word."""
    return not re.search(r"[=,\[\]%]|\\(cup|geqslant|text|circ|delta|hbar)|np\\.", bare)


def _respelled(bare: str) -> str:
    """Other commands and spaces for the same."""
    text = bare.replace("\\frac", "\\dfrac").replace("\\geqslant", "\\geq")
    if text.count("(") == text.count(")") and "\\left" not in text:
        text = text.replace("(", "\\left( ").replace(")", " \\right)")
    text = re.sub(r"\^\{(\d)\}", r"^\1", text)
    return re.sub(r"(?<=[^\\\s])([+=,])", r" \1 ", text)


def wrong_answers(truth: str) -> list[str]:
    """Responses that give another answer than `truth`, at least one."""
    bare = _bare(truth)
    numbers = list(re.finditer(r"\d+", bare))
    wrong = []
    if numbers:
        first = numbers[0]
        wrong.append(bare[: first.start()] + str(int(first[0]) + 1) + bare[first.end() :])
    if len(numbers) > 1:
        last = numbers[-1]
        wrong.append(bare[: last.start()] + str(int(last[0]) + 2) + bare[last.end() :])
    wrong.append(f"{bare}+1" if not re.fullmatch(r"[+-]?[\d.,]+", bare) else f"1{bare.lstrip('+-')}")
    if _is_value(bare) and not re.fullmatch(r"[-+0.]+", bare):  # zero has no sign
        wrong.append(f"-{bare}" if bare[0].isdigit() else f"-({bare})")
    elif bare.startswith("[") or "\\infty, 0)" in bare:
        wrong.append(bare.replace("[", "(").replace("0)", "0]"))
    elif "," in bare:
        wrong.append(bare.rpartition(",")[0] + ")" * bare.endswith(")"))  # an element is missing
    return [f"Answer: {text}" for text in wrong]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the benchmark files")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    truths = list(dict.fromkeys(read_truths(options.data)))
    lines = [json.dumps({"data_source": source, "ground_truth": truth}, ensure_ascii=False) for source, truth in truths]
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} different answers of {len({source for source, _ in truths})} sources", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
