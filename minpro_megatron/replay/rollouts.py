"""Stored rollouts: one JSON object per line, validated down to each token before any process starts.

A row: {"group": str, "prompt_ids": [int], "response_ids": [int], "behavior_log_probs": [float], "reward": float}, and
optionally "loss_mask": [0 or 1], "rollout_log_probs": [float] and, with sampling.top_k, "kept_ids": [[int]], the ids
that truncated sampling kept at each token; other fields are ignored.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from minpro_megatron.batching.supports import support_array
from minpro_megatron.errors import UserError
from minpro_megatron.records import Record

_MAX_PROBLEMS = 20  # number of problems in one report
_PER_TOKEN = ("behavior_log_probs", "rollout_log_probs", "loss_mask", "kept_ids")


class Rollout(Record, frozen=True, kw_only=True):
    """One row. All arrays except the prompt's have one entry per token of the response, which may be empty."""

    line: int  # in its file, from 1
    group: str
    prompt_ids: np.ndarray  # int32 [prompt tokens], at least one
    response_ids: np.ndarray  # int32 [response tokens]
    behavior_log_probs: np.ndarray  # float32 [response tokens]
    rollout_log_probs: np.ndarray  # float32 [response tokens]; zeros if they are not needed
    loss_mask: np.ndarray  # float32 [response tokens]: 1 where the token is trained on
    reward: float
    supports: np.ndarray | None = None  # what truncated sampling kept, in the form of batching/supports.py

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


def read_rollouts(
    path: Path, vocab_size: int, needs_rollout_log_probs: bool, top_k: int = 0, of_run: str = ""
) -> list[Rollout]:
    """The rows of the file in its order. `of_run` follows "sampling.top_k" in messages where it is that of a run.

    Raises UserError with one line per problem, which names file, line number and field, for an invalid row: token ids
    must be 0 .. vocab_size - 1, prompts must not be empty, the lists of a response must have its length, numbers must
    be finite, and rollout log-probs must exist if they are needed, kept ids with `top_k`."""
    types = _field_types(vocab_size, needs_rollout_log_probs, top_k)
    rows: list[Rollout] = []
    problems: list[str] = []
    try:
        with path.open("rb") as file:
            for number, line in _filled_lines(file):
                found, row = _read_row(number, line, types, of_run)
                if row is not None:
                    rows.append(row)
                problems += [f"{path}: line {number}: {problem}" for problem in found]
    except OSError as error:
        raise UserError(f"--rollouts {path}: {error.strerror}; give a JSON Lines file of rollouts") from None
    if problems:
        more = len(problems) - _MAX_PROBLEMS
        raise UserError(problems[:_MAX_PROBLEMS] + ([f"{path}: {more} more problems"] if more > 0 else []))
    if not rows:
        raise UserError(f"{path}: the file is empty; it needs one rollout per line")
    return rows


def _filled_lines(file: Any) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line), without the empty lines at the file's end."""
    empty: list[int] = []
    for number, line in enumerate(file, start=1):
        if not line.strip():
            empty.append(number)
            continue
        yield from ((skipped, b"") for skipped in empty)
        empty.clear()
        yield number, line


def _field_types(vocab_size: int, needs_rollout_log_probs: bool, top_k: int) -> dict[str, Any]:
    token_ids = list[Annotated[int, msgspec.Meta(ge=0, le=vocab_size - 1)]]
    types = {
        "group": str | int,
        "prompt_ids": token_ids,
        "response_ids": token_ids,
        "behavior_log_probs": list[float],
        "reward": float,
        "loss_mask": list[float | bool] | None,
    }
    if needs_rollout_log_probs:
        types["rollout_log_probs"] = list[float]
    return types | ({"kept_ids": list[token_ids]} if top_k else {})


def _read_row(number: int, line: bytes, types: dict[str, Any], of_run: str) -> tuple[list[str], Rollout | None]:
    """(problems, row); no row if there are problems."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return ["not JSON: the line is not UTF-8 text"], None
    except (ValueError, RecursionError) as error:
        return [f"not JSON: {error}" if line.strip() else "not JSON: the line is empty"], None
    if not isinstance(row, dict):
        return [f"{_shown(row)} is not an object; a row is {{'group': ..., 'prompt_ids': ..., ...}}"], None
    problems, values = [], {}
    for field, kind in types.items():
        if field not in row and field != "loss_mask":
            problems.append(_missing(field, of_run))
            continue
        try:
            values[field] = msgspec.convert(row.get(field), kind)
        except msgspec.ValidationError as error:
            problems.append(_wrong_value(field, row[field], error))
    if "kept_ids" in row and "kept_ids" not in types:
        remedy = (
            f"that{of_run} is 0; give the run that sampled it" if of_run else "give --run, or --set sampling.top_k=..."
        )
        problems.append(f"kept_ids: the response was sampled with sampling.top_k; {remedy}")
    problems += _disagreements(values)
    return problems, None if problems else _as_rollout(number, values)


def _missing(field: str, of_run: str) -> str:
    why = {
        "rollout_log_probs": " (the enabled corrections of the engines' mismatch need it, such as "
        "loss.truncated_importance)",
        "kept_ids": f" (sampling.top_k{of_run} needs it)",
    }
    return f"{field}: the field is missing{why.get(field, '')}"


def _wrong_value(field: str, value: Any, error: msgspec.ValidationError) -> str:
    """msgspec's error, such as "Expected `int`, got `str` - at `$[3]`", with the name of the field for $."""
    rule, _, place = str(error).partition(" - at `$")
    inside = place.rstrip("`")
    for index in re.findall(r"\[(\d+)\]", inside):
        value = value[int(index)]
    return f"{field}{inside} = {_shown(value)}: {rule.replace('`', '')}"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _disagreements(values: dict[str, Any]) -> Iterator[str]:
    """The problems of values that have the right types."""
    if values.get("prompt_ids") == []:
        yield "prompt_ids: it is empty; a response's first token is predicted from the token before it"
    if "reward" in values and not _is_float32(values["reward"]):
        yield f"reward = {values['reward']}: must be a finite number"
    response = values.get("response_ids")
    for field in _PER_TOKEN:
        numbers = values.get(field)
        if numbers is None:
            continue
        if response is not None and len(numbers) != len(response):
            what = "lists" if field == "kept_ids" else "numbers"
            yield f"{field}: has {len(numbers)} {what} for {len(response)} response_ids"
        if field == "kept_ids":
            yield from _wrong_kept_ids(numbers, response or [], values.get("loss_mask") or [])
            continue
        allowed, rule = (_is_mask, "0 or 1") if field == "loss_mask" else (_is_float32, "a finite number")
        wrong = next((index for index, number in enumerate(numbers) if not allowed(number)), None)
        if wrong is not None:
            yield f"{field}[{wrong}] = {numbers[wrong]}: must be {rule}"


def _wrong_kept_ids(kept: list[list[int]], response: list[int], mask: list[float]) -> Iterator[str]:
    """The first token that is not among its kept ids. Only one that is not trained on may keep none."""
    trained = mask or [1] * len(response)
    for index, (ids, token, is_trained) in enumerate(zip(kept, response, trained, strict=False)):
        if (is_trained or ids) and token not in ids:
            yield f"kept_ids[{index}] = {_shown(ids)}: must contain response_ids[{index}] = {token}"
            return


def _is_mask(number: float) -> bool:
    return number in (0, 1)


def _is_float32(number: float) -> bool:
    return abs(number) <= float(np.finfo(np.float32).max)  # False for NaN


def _as_rollout(number: int, values: dict[str, Any]) -> Rollout:
    length = len(values["response_ids"])
    mask, rollout = values["loss_mask"], values.get("rollout_log_probs")
    return Rollout(
        line=number,
        group=str(values["group"]),
        prompt_ids=np.array(values["prompt_ids"], np.int32),
        response_ids=np.array(values["response_ids"], np.int32),
        behavior_log_probs=np.array(values["behavior_log_probs"], np.float32),
        rollout_log_probs=np.zeros(length, np.float32) if rollout is None else np.array(rollout, np.float32),
        loss_mask=np.ones(length, np.float32) if mask is None else np.array(mask, np.float32),
        reward=values["reward"],
        supports=_supports(values.get("kept_ids")),
    )


def _supports(kept: list[list[int]] | None) -> np.ndarray | None:
    if kept is None:
        return None
    return support_array(np.array([len(ids) for ids in kept], np.int32), np.array([one for ids in kept for one in ids]))
