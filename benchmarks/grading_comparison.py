"""Disagreements of the reward `math` and Math-Verify, and the number of accepted wrong answers.

    python -m benchmarks.grading_comparison
    python -m benchmarks.grading_comparison --wrong 2000 --data DIR

The first form grades the rows of grading_golden.jsonl and grading_responses.jsonl in tests/unit/rewards/, which include
the correct verdict, with both, and prints every disagreement as a Markdown table. Math-Verify reads formulas only
between dollar signs, so it gets the answers of the golden table with them. The second form makes wrong answers from the
correct answers of the benchmark files (another sign, a number off by one, the other branch, another unit, words that
change the answer) and prints how many are accepted, and each of them. With `--verdicts FILE` each verdict is appended
to FILE, and the next call with the same FILE continues there. Remove FILE after a change of the grader."""

import argparse
import json
import logging
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from math_verify import parse, verify

from benchmarks.ground_truths import read_truths
from minpro_megatron.rewards.mathematics import grade

TABLES = Path(__file__).parents[1] / "tests" / "unit"
Row = tuple[str, str, str, bool]  # the true answer, a response, the same for Math-Verify, whether it is right
# A branch -> another one; the first that a true answer has is taken.
BRANCHES = [
    ("\\lfloor", "\\rfloor", "\\lceil", "\\rceil"), ("\\lceil", "\\rceil", "\\lfloor", "\\rfloor"),
    ("\\pm", "", "+", ""), ("\\cup", "", "\\cap", ""), ("\\sin", "", "\\cos", ""), ("\\cos", "", "\\sin", ""),
    ("\\geqslant", "", "\\leqslant", ""), ("\\infty)", "", "\\infty]", ""), ("!", "", "", ""),
    ("\\sqrt", "", "", ""), ("\\frac", "", "\\binom", ""), ("\\ln", "", "\\log", ""), ("e^", "", "2^", ""),
]  # fmt: skip
OTHER_UNITS = {"cents": "dollars", "circ": "\\text{ radians}", "cm": "m", "%": "\\text{ dollars}"}
CHANGING = [
    "{} million", "{} dozen", "{} hours {} minutes", "{} feet {} inches", "not ${}$", "at least ${}$",
    "all integers except ${}$", "${}$ or six", "more than ${}$", "{} 1/2", "{}\\frac{{1}}{{2}}", "{} {}", "{},{}",
    "${}$ squared", "{} \\text{{ or }} 3.25", "{}\\overline{{3}}", "x > {}", "({}, \\infty)",
]  # fmt: skip


def table_rows() -> Iterator[Row]:
    for line in (TABLES / "grading_golden.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        given = row["given"]
        yield row["answer"], f"Answer: {given}", given if "$" in given else f"Answer: ${given}$", row["equal"]
    for line in (TABLES / "grading_responses.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield row["answer"], row["response"], row["response"], bool(row["reward"])


def by_math_verify(truth: str, response: str) -> bool:
    return verify(parse(truth if "$" in truth else f"${truth}$"), parse(response))


def compare() -> None:
    counts: Counter[str] = Counter()
    print("| true answer | response | right | `math` | Math-Verify |\n|---|---|---|---|---|")
    for truth, response, with_dollars, right in table_rows():
        ours, theirs = grade(response, truth).reward == 1.0, by_math_verify(truth, with_dollars)
        counts["rows"] += 1
        counts[f"math: {_verdict(ours, right)}"] += 1
        counts[f"Math-Verify: {_verdict(theirs, right)}"] += 1
        if ours != theirs or ours != right:
            words = ["no", "yes"]
            cells = (repr(truth)[1:-1].replace("\\\\", "\\"), repr(response)[1:-1].replace("\\\\", "\\"))
            shown = " | ".join(f"`{cell}`".replace("|", "\\|") for cell in cells)
            print(f"| {shown} | {words[right]} | {words[ours]} | {words[theirs]} |")
    print("\n" + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))


def _verdict(verdict: bool, right: bool) -> str:
    return "right" if verdict == right else "false accept" if verdict else "false reject"


def wrong_answers(truth: str) -> Iterator[tuple[str, str]]:
    """(kind, wrong answer) of everything that can be done to `truth`."""
    bare = " ".join(truth.replace("$", "").split()).rstrip(".")
    is_number = re.fullmatch(r"[+-]?[\d.,]+", bare) is not None
    is_list = re.search(r"\\pm|[,=\[\]]|\\cup|geqslant|text|np\.", bare) is not None and not is_number
    if not is_list and not re.fullmatch(r"[-+0.]+", bare):
        yield "sign", f"-{bare}" if bare[0].isalnum() and is_number else f"-({bare})"
    for number in re.finditer(r"\d+", bare):
        for step in (1, -1):
            if int(number[0]) + step >= 0:
                yield "off by one", f"{bare[: number.start()]}{int(number[0]) + step}{bare[number.end() :]}"
    for before, before_closing, after, after_closing in BRANCHES:
        if before in bare:
            swapped = bare.replace(before, after)
            yield "branch", swapped.replace(before_closing, after_closing) if before_closing else swapped
    for unit, other in OTHER_UNITS.items():
        if unit in bare:
            yield "unit", re.sub(r"(?:\^\{?\\circ\}?|\\?%|\\(?:text|mbox)\{.*)", "", bare) + f" {other}"
    if is_number and len(bare) < 7:
        yield from (("words", form.format(*[bare] * 2)) for form in CHANGING)


def _sample(folder: Path, count: int) -> list[tuple[str, tuple[str, str, str]]]:
    """`count` of (kind, (source, true answer, wrong answer)); the same ones for the same files."""
    made: dict[str, list[tuple[str, str, str]]] = {}
    for source, truth in dict.fromkeys(read_truths(folder)):
        for kind, wrong in wrong_answers(truth):
            made.setdefault(kind, []).append((source, truth, wrong))
    chosen = random.Random(0)
    kinds = {kind: chosen.sample(rows, len(rows)) for kind, rows in made.items()}
    sample: list[tuple[str, tuple[str, str, str]]] = []
    while len(sample) < count and any(kinds.values()):  # by turns, so that rare kinds are there as a whole
        sample += [(kind, rows.pop()) for kind, rows in kinds.items() if rows]
    return sample[:count]


def _accepts(truth: str, wrong: str, known: dict[str, bool], verdicts: Path | None) -> bool:
    key = json.dumps([truth, wrong])
    if key not in known:
        known[key] = grade(f"Answer: {wrong}", truth).reward != 0.0
        if verdicts is not None:
            with verdicts.open("a", encoding="utf-8") as file:
                file.write(json.dumps([truth, wrong, known[key]]) + "\n")
    return known[key]


def count_false_accepts(folder: Path, count: int, verdicts: Path | None = None) -> int:
    """1 if one of the wrong answers is accepted, else 0."""
    known: dict[str, bool] = {}
    if verdicts is not None and verdicts.is_file():
        for line in verdicts.read_text(encoding="utf-8").splitlines():
            truth, wrong, verdict = json.loads(line)
            known[json.dumps([truth, wrong])] = verdict
    sample = _sample(folder, count)
    accepted = [(kind, row) for kind, row in sample if _accepts(row[1], row[2], known, verdicts)]
    print(", ".join(f"{kind} {number}" for kind, number in Counter(kind for kind, _ in sample).items()))
    print(", ".join(f"{source} {number}" for source, number in Counter(row[0] for _, row in sample).items()))
    print(f"{len(sample)} wrong answers, {len(accepted)} accepted")
    for kind, (source, truth, wrong) in accepted:
        print(f"  {kind}, {source}: {truth!r} as {wrong!r}")
    return 1 if accepted else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wrong", type=int, metavar="N", help="grade N wrong answers instead of comparing")
    parser.add_argument("--data", type=Path, help="folder with the benchmark files, for --wrong")
    parser.add_argument("--verdicts", type=Path, metavar="FILE.jsonl", help="keep the verdicts of --wrong; continue")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    if options.wrong is None:
        compare()
        return 0
    if options.data is None:
        parser.error("--wrong needs --data")
    return count_false_accepts(options.data, options.wrong, options.verdicts)


if __name__ == "__main__":
    sys.exit(main())
