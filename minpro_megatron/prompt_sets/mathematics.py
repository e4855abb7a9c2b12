"""The mathematics data sets: which columns contain question and answer, and which rows are included.

Each is read in the schema of its first publication, in those of common copies, in verl's (`prompt` a list of messages,
`reward_model.ground_truth` the answer) and in slime's (`prompt` a list of messages or a text, `label` the answer).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from minpro_megatron.config.instructions import DAPO_BEFORE
from minpro_megatron.prompt_sets import answers, data_files, rows
from minpro_megatron.prompt_sets.answers import ListRule, answer_text
from minpro_megatron.prompt_sets.assemble import Question, Unwanted
from minpro_megatron.prompt_sets.chats import chat_in, only_message
from minpro_megatron.prompt_sets.instructions import has_dapo_instruction, without_instructions

VERL_ANSWER, SLIME_ANSWER = "reward_model", "label"

_CHINESE = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
_PICTURE = re.compile(r"<image|<img|\\includegraphics")


class _Reading(Protocol):
    """Returns the answer in a column's value. Raises ValueError with the rule that the value breaks."""

    def __call__(self, value: Any, rule: ListRule = "one") -> str: ...


def _always_wanted(row: dict[str, Any]) -> str:
    return ""


class _Unwanted(Protocol):
    """Returns the reason why a row does not belong in the set; empty if it does."""

    def __call__(self, row: dict[str, Any]) -> str: ...


@dataclass(frozen=True)
class MathSet:
    """A data set. The first of `questions` and of `answers` (columns and their readers) that a row has is used."""

    source: str
    about: str
    questions: tuple[str, ...]
    answers: Mapping[str, _Reading]
    other_answer: _Reading = answer_text  # for rows in verl's schema or slime's
    must_be_wrapped: bool = False  # rows in verl's schema contain DAPO's instruction
    unwanted: _Unwanted = _always_wanted
    more_columns: tuple[str, ...] = ()
    answer_lists: ListRule = "one"

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.questions, *self.answers, "prompt", VERL_ANSWER, SLIME_ANSWER, *self.more_columns)

    def convert(self, path: Path, number: int, row: dict[str, Any]) -> Question | Unwanted:
        messages = chat_in(row.get("prompt"))
        if messages is None and (reason := self.unwanted(row)):
            return Unwanted(reason)
        if messages is not None:
            text = only_message(path, number, messages)
            if self.must_be_wrapped and not has_dapo_instruction(text):
                rule = f"must begin with DAPO's instruction {DAPO_BEFORE[:40]!r}... and end with its reminder"
                raise rows.DamagedRow(path, number, "prompt", rule)
            field, value = _answer_beside_chat(path, number, row)
        else:
            column = _first_present((*self.questions, "prompt"), row)
            text = self._text(path, number, row, column)
            field = _first_present((*self.answers, SLIME_ANSWER), row)
            value = row.get(field)
        try:
            answer = self.answers.get(field, self.other_answer)(value, self.answer_lists)
        except ValueError as error:
            raise rows.DamagedRow(path, number, field, str(error)) from None
        context = row.get("context") or ""
        return Question(f"{context}\n\n{without_instructions(text)}".strip(), answer)

    def _text(self, path: Path, number: int, row: dict[str, Any], column: str) -> str:
        if column not in row:
            raise data_files.missing_field(path, number, row, column)
        return rows.text_field(path, number, row, column)


def _answer_beside_chat(path: Path, number: int, row: dict[str, Any]) -> tuple[str, Any]:
    """(column, value). Raises DamagedRow if the row has neither verl's answer nor slime's."""
    grading = row.get(VERL_ANSWER)
    if isinstance(grading, dict) and "ground_truth" in grading:
        return VERL_ANSWER, grading["ground_truth"]
    if row.get(SLIME_ANSWER) is not None:
        return SLIME_ANSWER, row[SLIME_ANSWER]
    present = data_files.missing_field(path, number, row, VERL_ANSWER).present
    rule = (
        f"must have the answer to a prompt that is a chat: {VERL_ANSWER}.ground_truth (verl's schema) or "
        f"{SLIME_ANSWER} (slime's); there is {present}. Name another one with: minpro prepare custom --answer-column"
    )
    raise rows.DamagedRow(path, number, VERL_ANSWER, rule)


def _first_present(columns: tuple[str, ...], row: dict[str, Any]) -> str:
    return next((name for name in columns if row.get(name) is not None), columns[0])


def _no_olympiad_mathematics(row: dict[str, Any]) -> str:
    """Why a row of the full OlympiadBench is outside its mathematics, English, text-only, open-ended part."""
    question = str(row.get("question") or "")
    if str(row.get("subject") or "Math").lower() not in ("math", "maths", "mathematics"):
        return "not mathematics"
    if str(row.get("language") or "English") != "English" or _CHINESE.search(question):
        return "not in English"
    if "multimodal" in str(row.get("modality") or "").lower() or _PICTURE.search(question):
        return "not text only"
    if "open" not in str(row.get("question_type") or "Open-ended").lower() or not row.get("final_answer"):
        return "not open-ended: a proof, without a final answer"
    return ""


SETS = {
    made.source: made
    for made in (
        MathSet(
            "dapo",
            "DAPO-Math-17K: BytedTsinghua-SIA/DAPO-Math-17k (1.79 million rows, about 17.4 thousand questions), or a "
            "processed copy with the columns prompt and solution (or answer)",
            ("prompt", "problem"),
            {"solution": answers.answer_text, "answer": answers.answer_text},
            must_be_wrapped=True,
        ),
        MathSet(
            "gsm8k",
            "GSM8K: openai/gsm8k:main/train-*.parquet or main/test-*.parquet, or its JSON Lines; the answer is the "
            "number after ####",
            ("question",),
            {"answer": answers.after_hashes},
        ),
        MathSet(
            "math500",
            "MATH-500: HuggingFaceH4/MATH-500; answers are LaTeX",
            ("problem",),
            {"answer": answers.answer_text, "solution": answers.boxed},
        ),
        MathSet(
            "aime24",
            "AIME 2024, 30 questions: HuggingFaceH4/aime_2024, Maxwell-Jia/AIME_2024, or DAPO's copy of it",
            ("problem", "question", "Problem"),
            {"answer": answers.competition_answer, "Answer": answers.competition_answer},
            other_answer=answers.competition_answer,
        ),
        MathSet(
            "aime25",
            "AIME 2025, 30 questions: math-ai/aime25, or in verl's schema",
            ("problem", "question"),
            {"answer": answers.competition_answer},
            other_answer=answers.competition_answer,
        ),
        MathSet(
            "amc23",
            "AMC 2023, 40 questions: math-ai/amc23; 27.0 becomes 27",
            ("problem", "question"),
            {"answer": answers.answer_text},
        ),
        MathSet(
            "olympiad",
            "OlympiadBench: Hothan/OlympiadBench:OE_TO_maths_en_COMP/*.parquet, or the whole of it; mathematics, "
            "English, text-only and open-ended rows are kept. Several answers are one text with commas; the columns "
            "unit and error are not part of the answer",
            ("question",),
            {"final_answer": answers.answer_text, "answer": answers.answer_text},
            unwanted=_no_olympiad_mathematics,
            answer_lists="all",
            more_columns=("context", "subject", "language", "modality", "question_type"),
        ),
        MathSet(
            "minerva",
            "Minerva's OCW courses, 272 questions: math-ai/minervamath, or the original with the answer in the "
            "solution's \\boxed{} (units are outside it and are not included)",
            ("problem", "question"),
            {"solution": answers.boxed, "answer": answers.answer_text},
        ),
    )
}
