"""The groups of a run's journal as rows that a replay reads."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minpro_megatron.batching.stored_arrays import read_array
from minpro_megatron.batching.supports import sizes_and_ids
from minpro_megatron.buffer.journal_reader import GroupRow, JournalReader, StoredGroup, StoredResponse
from minpro_megatron.buffer.journal_settings import top_k_of_run
from minpro_megatron.errors import UserError


def export_rows(reader: JournalReader, group: StoredGroup) -> list[dict[str, Any]]:
    """The group's responses as rows of `replay.rollouts`; none if behavior log-probs are missing. Raises JournalError
    if the file of its kept ids is missing or damaged."""
    if not group.responses or any(r.token_ids is None or r.behavior_log_probs is None for r in group.responses):
        return []
    return [
        {
            "group": str(group.group_id),
            "prompt_ids": group.prompt_token_ids.tolist(),
            "response_ids": without_nan(response.token_ids),
            "behavior_log_probs": _numbers(response, response.behavior_log_probs),
            "rollout_log_probs": _numbers(response, response.rollout_log_probs),
            **({} if response.loss_mask is None else {"loss_mask": response.loss_mask.tolist()}),
            **_kept_ids(reader, group.group_id, response),
            "reward": response.reward,
            "step": group.consumed_step,
            "prompt_id": group.prompt_id,
            "policy_versions": without_nan(response.policy_versions),
            "finish_reason": response.finish_reason,
        }
        for response in group.responses
    ]


def _kept_ids(reader: JournalReader, group_id: int, response: StoredResponse) -> dict[str, Any]:
    """The field with what truncated sampling kept; none for a response without it."""
    stored = reader.stored_supports(group_id, response)
    if stored is None:
        return {}
    sizes, ids = sizes_and_ids(read_array(stored, "kept ids"), response.num_tokens)
    return {"kept_ids": [part.tolist() for part in np.split(ids, np.cumsum(sizes)[:-1])]}


def _numbers(response: StoredResponse, values: np.ndarray | None) -> list[Any] | None:
    """The values of a row, which must be numbers: those of given tokens, which the loss mask excludes, become 0."""
    if values is None or response.loss_mask is None:
        return without_nan(values)
    return without_nan(np.where(response.loss_mask != 0, values, 0))


def without_nan(values: np.ndarray | None) -> list[Any] | None:
    """For JSON, which has no NaN: null instead."""
    if values is None:
        return None
    return [None if value != value else value for value in values.tolist()]


def export_groups(reader: JournalReader, chosen: Sequence[GroupRow], path: Path) -> str:
    """A summary of what was written. Raises UserError if nothing can be written, the file already exists, or a chosen
    group's log-probs are those among kept ids that were pruned."""
    if path.exists():
        raise UserError(f"--export {path}: the file exists; give a new name")
    num_groups = num_rows = 0
    top_k = top_k_of_run(reader.path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("w", encoding="utf-8") as file:
            for row in chosen:
                rows = [
                    r for group in reader.groups("group_id = ?", (row.group_id,)) for r in export_rows(reader, group)
                ]
                if top_k and any("kept_ids" not in one for one in rows):
                    raise UserError(f"--export {path}: {_without_kept_ids(top_k, row)}")
                file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)
                num_groups += bool(rows)
                num_rows += len(rows)
        if not num_rows:
            raise UserError(
                f"--export {path}: none of the {len(chosen)} chosen groups has behavior log-probs: they are not scored "
                "yet, or pruned; choose others, such as --state consumed and late steps"
            )
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
    left_out = len(chosen) - num_groups
    return f"wrote {num_rows} rows of {num_groups} groups to {path}" + (
        f"; {left_out} groups skipped: not scored yet, or pruned" if left_out else ""
    )


def _without_kept_ids(top_k: int, row: GroupRow) -> str:
    step = "" if row.consumed_step is None else f" (global step {row.consumed_step})"
    return (
        f"the run has sampling.top_k = {top_k}, but the kept ids of group {row.group_id}{step} are no longer in the "
        "journal, and its behavior log-probs are those among them; choose later steps with --step, or export from a "
        "run with collector.journal_keep_routes=true"
    )
