"""The mathematics data sets: which columns hold question and answer, and which rows belong in.

Each is read in its first publication's schema, in those of common copies, and in verl's (`prompt` a list of messages,
`reward_model.ground_truth` the answer).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minpro_megatron.config.instructions import DAPO_AFTER, DAPO_BEFORE
from tools.prompt_sets import answers, rows
from tools.prompt_sets.assemble import Question, Unwanted

_CHINESE = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
_PICTURE = re.compile(r"<image|<img|\\includegraphics")


@dataclass(frozen=True)
class MathSet:
    """A data set. Of `questions` and `answers` (columns and how to read them) the first that a row has are taken."""

    source: str
    about: str
    questions: tuple[str, ...]
    answers: Mapping[str, Callable[[Any], str]]
    verl_answer: Callable[[Any], str] | None = None  # of rows in verl's schema
    must_be_wrapped: bool = False  # rows in verl's schema hold DAPO's instruction
    unwanted: Callable[[dict[str, Any]], str] = lambda row: ""  # why a row does not belong in
    more_columns: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.questions, *self.answers, "prompt", "reward_model", *self.more_columns)

    def convert(self, path: Path, number: int, row: dict[str, Any]) -> Question | Unwanted:
        if reason := self.unwanted(row):
            return Unwanted(reason)
        if self.verl_answer and isinstance(row.get("prompt"), list):
            text, field = only_message(path, number, row["prompt"]), "reward_model"
            if self.must_be_wrapped and not _is_wrapped(text):
                rule = f"must begin with DAPO's instruction {DAPO_BEFORE[:40]!r}... and end with its reminder"
                raise rows.DamagedRow(path, number, "prompt", rule)
            grading = row.get(field)
            read, value = self.verl_answer, grading.get("ground_truth") if isinstance(grading, dict) else None
        else:
            text = rows.text_field(path, number, row, _first_present(self.questions, row))
            field = _first_present(tuple(self.answers), row)
            read, value = self.answers[field], row.get(field)
        context = row.get("context") or ""
        try:
            answer = read(value)
        except ValueError as error:
            raise rows.DamagedRow(path, number, field, str(error)) from None
        return Question(f"{context}\n\n{unwrap(text)}".strip(), answer)


def _first_present(columns: tuple[str, ...], row: dict[str, Any]) -> str:
    return next((name for name in columns if row.get(name) is not None), columns[0])


def only_message(path: Path, number: int, messages: list[Any]) -> str:
    """The text of a prompt that is a chat of one user's turn. Raises DamagedRow for any other."""
    if len(messages) != 1 or not isinstance(messages[0], dict) or messages[0].get("role") != "user":
        raise rows.DamagedRow(path, number, "prompt", "must be one message of the role user")
    return rows.text_field(path, number, messages[0], "content")


def _is_wrapped(text: str) -> bool:
    return text.startswith(DAPO_BEFORE) and text.endswith(DAPO_AFTER)


def unwrap(text: str) -> str:
    """The question in DAPO's instruction, or `text` itself where there is none."""
    inner = text.removeprefix(DAPO_BEFORE).removesuffix(DAPO_AFTER) if _is_wrapped(text) else text
    return inner.strip()


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
            verl_answer=answers.answer_text,
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
            verl_answer=answers.competition_answer,
        ),
        MathSet(
            "aime25",
            "AIME 2025, 30 questions: math-ai/aime25, or in verl's schema",
            ("problem", "question"),
            {"answer": answers.competition_answer},
            verl_answer=answers.competition_answer,
        ),
        MathSet(
            "amc23",
            "AMC 2023, 40 questions: math-ai/amc23; 27.0 becomes 27",
            ("problem", "question"),
            {"answer": answers.answer_text},
            verl_answer=answers.answer_text,
        ),
        MathSet(
            "olympiad",
            "OlympiadBench: Hothan/OlympiadBench:OE_TO_maths_en_COMP/*.parquet, or the whole of it; mathematics, "
            "English, text-only and open-ended rows are kept. Several answers are one text with commas; the columns "
            "unit and error are not part of the answer",
            ("question",),
            {"final_answer": answers.answer_text, "answer": answers.answer_text},
            unwanted=_no_olympiad_mathematics,
            more_columns=("context", "subject", "language", "modality", "question_type"),
        ),
        MathSet(
            "minerva",
            "Minerva's OCW courses, 272 questions: math-ai/minervamath, or the original with the answer in the "
            "solution's \\boxed{} (units stand outside it and are left out)",
            ("problem", "question"),
            {"solution": answers.boxed, "answer": answers.answer_text},
        ),
    )
}
