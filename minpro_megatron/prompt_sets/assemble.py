"""Assembles a prompt set from rows: every question once, without contradictions, with a report of dropped rows."""

import json
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from minpro_megatron.errors import UserError
from minpro_megatron.files.replacement import replace_file
from minpro_megatron.prompt_sets import data_files, rows
from minpro_megatron.prompt_sets.instructions import shared_ends
from minpro_megatron.prompt_sets.self_check import Refusal, grader_check

REPORT_EVERY_S = 2.0
# Dropped rows are listed up to this number for each reason; the count has no limit.
MAX_LISTED = 100
DUPLICATE = "the same question again"
CONFLICT = "the question comes with several answers"
SHOWN_REFUSALS = 3


@dataclass(frozen=True, slots=True)
class Question:
    """A question without any instruction, its system message if it has one, its answer in the grader's form, and what
    else its row holds."""

    text: str
    answer: str
    prefix: str = ""
    pass_rate: float | None = None
    system: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The text by which questions are compared: text, prefix and system message, the first without white space and
        Unicode composition."""
        more = [self.prefix, self.system] if self.system else [self.prefix] if self.prefix else []
        return "\0".join([_plain(self.text), *more])


@dataclass(frozen=True, slots=True)
class Unwanted:
    """A valid row that does not belong in the set, and why."""

    reason: str


# (file, row number, row) -> the result for it; raises rows.DamagedRow if a row breaks the data set's rules.
Convert = Callable[[Path, int, dict[str, Any]], Question | Unwanted]


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


@dataclass
class PromptSet:
    """The distinct questions seen so far. Memory grows with their number, not with that of the rows."""

    source: str
    num_rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    _questions: dict[str, Question] = field(default_factory=dict)
    _copies: Counter[str] = field(default_factory=Counter)
    _places: dict[str, tuple[str, int]] = field(default_factory=dict)  # file and row of a question's first occurrence
    _answers: dict[str, list[str]] = field(default_factory=dict)  # of questions with several answers
    _listed: list[dict[str, Any]] = field(default_factory=list)

    @property
    def num_questions(self) -> int:
        return len(self._questions)

    def add(self, path: Path, row_number: int, found: Question | Unwanted) -> None:
        self.num_rows += 1
        if isinstance(found, Unwanted):
            self.dropped[found.reason] += 1
            if self.dropped[found.reason] <= MAX_LISTED:
                self._listed.append({"reason": found.reason, "file": path.name, "row": row_number})
            return
        if not found.text:
            raise rows.DamagedRow(path, row_number, "prompt", "must have a question, and not an instruction alone")
        key = found.key
        first = self._questions.setdefault(key, found)
        self._places.setdefault(key, (path.name, row_number))
        self._copies[key] += 1
        if not _same(first.answer, found.answer):
            answers = self._answers.setdefault(key, [first.answer])
            if not any(_same(answer, found.answer) for answer in answers):
                answers.append(found.answer)

    def finish(self) -> list[dict[str, Any]]:
        """The prompt rows. The counts of dropped rows are complete after this call."""
        for number, (key, answers) in enumerate(self._answers.items()):
            self.dropped[CONFLICT] += self._copies[key]
            if number < MAX_LISTED:
                self._listed.append({"reason": CONFLICT, "prompt": self._questions[key].text, "answers": answers})
        kept = self._kept()
        self.dropped[DUPLICATE] += sum(self._copies[key] - 1 for key in kept)
        return [self._row(key, question) for key, question in kept.items()]

    def _kept(self) -> dict[str, Question]:
        return {key: question for key, question in self._questions.items() if key not in self._answers}

    def refusals(self, check: Callable[[str], Refusal | None]) -> list[dict[str, Any]]:
        """The kept questions whose answer `check` refuses: file, row, answer and the grader's error."""
        found: list[dict[str, Any]] = []
        for key, question in self._kept().items():
            if (refusal := check(question.answer)) is not None:
                file, row = self._places[key]
                found.append({"file": file, "row": row, "answer": refusal.answer, "problem": refusal.problem})
        return found

    def _row(self, key: str, question: Question) -> dict[str, Any]:
        digest = blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        row: dict[str, Any] = {
            "id": f"{self.source}-{digest}",
            "source": self.source,
            "prompt": question.text,
            "answer": question.answer,
        }
        if question.pass_rate is not None:
            row["pass_rate"] = question.pass_rate
        if question.prefix:
            row["prefix"] = question.prefix
        if question.system:
            row["system"] = question.system
        if question.metadata:
            row["metadata"] = question.metadata
        return row

    def report(self, inputs: Iterable[Path], kept: int, seconds: float) -> dict[str, Any]:
        return {
            "source": self.source,
            "inputs": [str(path) for path in inputs],
            "rows": self.num_rows,
            "kept": kept,
            "dropped": {reason: count for reason, count in self.dropped.most_common() if count},
            "conflicting_questions": len(self._answers),
            "seconds": round(seconds, 1),
            "listed": self._listed,
        }


def _same(one: str, other: str) -> bool:
    return one == other or "".join(one.split()) == "".join(other.split())


def assemble(
    source: str, inputs: list[Path], columns: Iterable[str] | None, convert: Convert, output: Path, reward: str
) -> list[str]:
    """Writes the prompt set of `inputs` to `output` and a report next to it. `columns` None: all are read. Returns the
    lines of a short summary with
    answers that the grader `reward` does not accept as their own response.

    Raises rows.DamagedRow at the first damaged row, and UserError if nothing is left; nothing is written then.
    """
    start, made, check = time.perf_counter(), PromptSet(source), grader_check(reward)
    wanted = None if columns is None else list(columns)
    for path in inputs:
        for number, row in _with_progress(path, data_files.read_rows(path, wanted), made):
            made.add(path, number, convert(path, number, row))
    prompts = made.finish()
    report = made.report(inputs, len(prompts), time.perf_counter() - start)
    lines = [f"{made.num_rows:8d} rows in {', '.join(path.name for path in inputs)}"]
    lines += [f"{count:8d} dropped: {reason}" for reason, count in report["dropped"].items()]
    if made.dropped[CONFLICT]:
        lines.append(f"{report['conflicting_questions']:8d} questions had several answers")
    if not prompts:
        raise UserError([f"{', '.join(map(str, inputs))}: no prompt is left:", *lines])
    refused, shared = made.refusals(check), shared_ends([row["prompt"] for row in prompts])
    report |= {"reward": reward, "answers_not_accepted": len(refused), "not_accepted": refused[:MAX_LISTED]}
    rows.write_prompts(output, prompts)
    report_path = output.with_suffix(".report.json")
    replace_file(report_path, json.dumps(report, ensure_ascii=False, indent=1) + "\n")
    lines += [f"{len(prompts):8d} prompts in {output}", f"         what was dropped: {report_path}"]
    return lines + _refusal_lines(reward, refused) + [_shared_line(text) for text in shared]


def _refusal_lines(reward: str, refused: list[dict[str, Any]]) -> list[str]:
    if not refused:
        return []
    first = [
        f"{one['file']}, row {one['row']}: {one['answer']!r:.80}"
        + (f" ({one['problem']:.200})" if one["problem"] else "")
        for one in refused[:SHOWN_REFUSALS]
    ]
    return [
        f"{len(refused):8d} answers that the reward {reward} does not accept as their own response, so no response "
        f"to these prompts can be correct; fix them, or choose another reward; the first: {'; '.join(first)}"
    ]


def _shared_line(text: str) -> str:
    return (
        f"         every prompt has {text!r:.200}: if it is an instruction, remove it from the data, or set "
        "data.instruction=none"
    )


def _with_progress(
    path: Path, source: Iterator[tuple[int, dict[str, Any]]], made: PromptSet
) -> Iterator[tuple[int, dict[str, Any]]]:
    total = data_files.count_rows(path)
    of_all = f" of {total:,}" if total is not None else ""
    start = last = time.perf_counter()
    for number, row in source:
        yield number, row
        if number % 1024 == 0 and (now := time.perf_counter()) - last >= REPORT_EVERY_S:
            last, rate = now, number / (now - start)
            left = f", {(total - number) / rate:.0f} s left" if total is not None else ""
            message = (
                f"{path.name}: {number:,}{of_all} rows, {rate:,.0f} rows/s{left}, {made.num_questions:,} questions"
            )
            print(message, file=sys.stderr, flush=True)
