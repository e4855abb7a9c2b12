"""Rolls a journal back to a checkpoint: groups consumed since are ready again, groups sampled by later weights are not.

The checkpoint of version s contains the weights theta_s; no later weights survive a crash. The groups that steps
before s have not consumed are therefore treated as follows:

- a group with a token of a version above s is sampled again, with the same prompt and seeds;
- a group issued at a version above s is deleted; it will be issued again under the same id;
- a group of a batch that is completely scored without it is surplus, and dropped (delay mode);
- a group whose tokens or (if the run needs them) routes or supports have been pruned is sampled again;
- a group whose behavior log-probs are known is ready: scores are computed once and never change;
- a group without scores is ready if all its tokens are of version s, which the trainer can still score; otherwise it is
  sampled again;
- a damaged group (journal_checksums.py) is sampled again, as far as that is possible (journal_damage.py).
"""

import sqlite3
from typing import NamedTuple

import numpy as np

from minpro_megatron.buffer.journal_checksums import response_rows, seal_groups
from minpro_megatron.buffer.journal_damage import discard_damaged_responses, discard_responses, refuse_needed_rows
from minpro_megatron.buffer.journal_errors import REPLACE, JournalError
from minpro_megatron.buffer.journal_rows import loss_mask_of, turns_of
from minpro_megatron.buffer.route_files import RouteFiles
from minpro_megatron.records import NOT_GRADED, Response


class RestoredGroup(NamedTuple):
    """A group that no step has consumed. `responses` is empty if the group is to be sampled (again); `prompt_id` is
    empty if its row was damaged."""

    group_id: int
    issued_version: int
    batch_index: int
    prompt_id: str
    dropped: bool
    responses: list[Response]


class Needed(NamedTuple):
    """What the run needs besides the tokens of a group."""

    routes: bool = False  # of the servers (R3)
    supports: bool = False  # what truncated sampling kept


NOTHING_NEEDED = Needed()
_PRUNED = (
    "SELECT 1 FROM responses WHERE responses.group_id = groups.group_id"
    " AND (token_ids IS NULL OR (:needs_routes AND routes IS NULL) OR (:needs_supports AND supports IS NULL))"
)
_SURPLUS = (
    "state = 'collected' AND (SELECT count(*) FROM groups AS others WHERE others.batch_index = groups.batch_index"
    " AND others.state = 'scored') >= :num_prompts"
)


def roll_back(
    connection: sqlite3.Connection, version: int, num_prompts: int, delay_mode: bool, needed: Needed = NOTHING_NEEDED
) -> list[str]:
    """Changes the journal's states as described above, inside the caller's transaction. Returns a line for each damaged
    group that is not needed. Raises JournalError if the journal lacks something that the checkpoint of `version`
    includes, or if something needed is damaged."""
    values = {"version": version, "needs_routes": needed.routes, "needs_supports": needed.supports}
    connection.execute("REINDEX groups")  # a damaged index selects wrong rows without any error
    damaged = refuse_needed_rows(connection, version, num_prompts, delay_mode)
    for table, column in (("versions", "version"), ("evaluations", "policy_version"), ("beginnings", "version")):
        connection.execute(f"DELETE FROM {table} WHERE {column} > :version", values)
    connection.execute(
        "UPDATE groups SET state = 'scored', consumed_step = NULL, staleness = NULL, trained = NULL"
        " WHERE state = 'consumed' AND consumed_step >= :version",
        values,
    )
    # the repeated update computes its own, or records none
    connection.execute(
        "DELETE FROM trained_scores WHERE group_id IN (SELECT group_id FROM groups WHERE consumed_step IS NULL)"
    )
    if delay_mode:
        connection.execute(f"UPDATE groups SET state = 'dropped' WHERE {_SURPLUS}", {"num_prompts": num_prompts})
    else:
        connection.execute("UPDATE groups SET batch_index = -1 WHERE consumed_step IS NULL")
    void = connection.execute(
        "SELECT group_id FROM groups WHERE consumed_step IS NULL AND state <> 'issued' AND (newest_version > :version"
        f" OR (state <> 'dropped' AND EXISTS ({_PRUNED}))"
        " OR (state = 'collected' AND oldest_version < :version))",
        values,
    ).fetchall()
    discard_responses(connection, (group_id for (group_id,) in void))
    damaged += discard_damaged_responses(connection, version, delay_mode)
    seal_groups(connection, "consumed_step IS NULL")
    try:
        _check(connection, version, num_prompts, delay_mode)
    except JournalError as error:
        raise JournalError(f"{error} (damaged: {damaged[0]})" if damaged else str(error)) from None
    return damaged


def _check(connection: sqlite3.Connection, version: int, num_prompts: int, delay_mode: bool) -> None:
    consumed = connection.execute("SELECT count(*) FROM groups WHERE state = 'consumed'").fetchone()[0]
    if consumed != version * num_prompts:
        raise JournalError(
            f"the checkpoint of version {version} has consumed {version * num_prompts} groups, the journal {consumed}: "
            "they do not belong together; restore both from the same backup, or start under a new name"
        )
    counts = dict(connection.execute("SELECT consumed_step, count(*) FROM groups GROUP BY consumed_step"))
    for step in (step for step in range(version) if counts.get(step, 0) != num_prompts):
        raise JournalError(
            f"global step {step} has consumed {num_prompts} groups, but the journal has {counts.get(step, 0)}: it is "
            f"damaged; {REPLACE}"
        )
    found = {group_id for (group_id,) in connection.execute("SELECT group_id FROM groups")}  # a page may hold one twice
    last = max(found, default=-1)
    if len(found) != last + 1:
        raise JournalError(f"it has {len(found)} of the groups 0 to {last}: it is damaged; {REPLACE}")
    lost = connection.execute(
        "SELECT count(*) FROM groups WHERE state = 'issued' AND issued_version < ?", (version,)
    ).fetchone()[0]
    if lost and delay_mode:
        raise JournalError(
            f"{lost} groups sampled with versions before {version} are lost, but the checkpoint includes them: the "
            "journal is older than the checkpoint, or has pruned their tokens (collector.journal_keep_steps), or "
            "routes or kept ids (collector.journal_keep_routes); restore the journal that belongs to it, or resume "
            "from another checkpoint"
        )


def groups_with_files(connection: sqlite3.Connection) -> list[int]:
    """The groups whose routes or supports are in files."""
    query = "SELECT DISTINCT group_id FROM responses WHERE routes IS NOT NULL OR supports IS NOT NULL"
    return [row[0] for row in connection.execute(query)]


def restore_groups(connection: sqlite3.Connection, routes: RouteFiles) -> tuple[list[RestoredGroup], int]:
    """The groups that are not consumed, in order of id, and the id after the last used one."""
    rows = connection.execute(
        "SELECT group_id, issued_version, batch_index, prompt_id, state FROM groups"
        " WHERE state <> 'consumed' ORDER BY group_id"
    ).fetchall()
    groups = []
    for group_id, issued_version, batch_index, prompt_id, state in rows:
        responses = [] if state in ("issued", "dropped") else _responses(connection, group_id, routes)
        groups.append(RestoredGroup(group_id, issued_version, batch_index, prompt_id, state == "dropped", responses))
    last = connection.execute("SELECT coalesce(max(group_id), -1) FROM groups").fetchone()[0]
    return groups, last + 1


def _responses(connection: sqlite3.Connection, group_id: int, routes: RouteFiles) -> list[Response]:
    responses = []
    for row in response_rows(connection, group_id):
        versions, lengths = np.frombuffer(_kept(row.policy_versions), dtype="<i4").reshape(-1, 2).T
        behavior = row.behavior_log_probs
        response = Response(
            token_ids=np.frombuffer(_kept(row.token_ids), dtype="<i4"),
            rollout_log_probs=np.frombuffer(_kept(row.rollout_log_probs), dtype="<f4"),
            policy_versions=np.repeat(versions, lengths),
            finish_reason=row.finish_reason,
            reward=NOT_GRADED if row.reward is None else row.reward,
            loss_mask=loss_mask_of(row.loss_mask),
            turns=turns_of(row.turns),
            behavior_log_probs=None if behavior is None else np.frombuffer(behavior, dtype="<f4"),
            stored_routes=routes.verified(group_id, row.routes),
            stored_supports=routes.verified(group_id, row.supports, "kept ids"),
        )
        responses.append(response)
    return responses


def _kept(data: bytes | None) -> bytes:
    assert data is not None, "a group that was pruned is sampled again"
    return data
