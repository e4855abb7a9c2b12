"""A journal taken back to a checkpoint: what was consumed since is ready again, what later weights sampled is void.

The checkpoint of version s holds the weights theta_s, and nothing of other weights survives a crash. So of the groups
that steps before s have not consumed

- those with a token of a version above s are void: they are sampled again, with the same prompt and seeds;
- those issued at a version above s are forgotten: they will be issued again under the same id;
- those of a batch that is scored without them are surplus, and dropped (delay mode);
- those whose tokens or (where the run needs them) routes have been pruned are void as well;
- those whose behavior log-probs are known are ready: their scores were computed once and stay;
- those without scores are ready if all their tokens are of version s, which the trainer can still score; else void;
- those that are damaged (journal_checksums.py) are void, as far as they can be sampled again (journal_damage.py).
"""

import json
import sqlite3
from typing import NamedTuple

import numpy as np

from minpro_megatron.buffer.journal_checksums import seal_groups
from minpro_megatron.buffer.journal_damage import make_void, refuse_needed_rows, void_damaged_responses
from minpro_megatron.buffer.journal_errors import REPLACE, JournalError
from minpro_megatron.buffer.route_files import RouteFiles
from minpro_megatron.records import NOT_GRADED, Response


class RestoredGroup(NamedTuple):
    """A group that no step has consumed. `responses` is empty for one that is to be sampled (again), and `prompt_id` is
    for one whose row was damaged."""

    group_id: int
    issued_version: int
    batch_index: int
    prompt_id: str
    dropped: bool
    responses: list[Response]


_PRUNED = (
    "SELECT 1 FROM responses WHERE responses.group_id = groups.group_id"
    " AND (token_ids IS NULL OR (:needs_routes AND routes IS NULL))"
)
_SURPLUS = (
    "state = 'collected' AND (SELECT count(*) FROM groups AS others WHERE others.batch_index = groups.batch_index"
    " AND others.state = 'scored') >= :num_prompts"
)


def roll_back(
    connection: sqlite3.Connection, version: int, num_prompts: int, delay_mode: bool, needs_routes: bool = False
) -> list[str]:
    """Changes the journal's states as above, inside the caller's transaction. Returns a line for everything that is
    damaged and not needed. Raises JournalError if the journal does not hold what the checkpoint of `version` includes,
    or what is needed of it is damaged."""
    values = {"version": version, "needs_routes": needs_routes}
    connection.execute("REINDEX groups")  # a damaged index chooses other rows, and nothing reports it
    damaged = refuse_needed_rows(connection, version, num_prompts, delay_mode)
    for table, column in (("versions", "version"), ("evaluations", "policy_version"), ("beginnings", "version")):
        connection.execute(f"DELETE FROM {table} WHERE {column} > :version", values)
    connection.execute(
        "UPDATE groups SET state = 'scored', consumed_step = NULL, staleness = NULL"
        " WHERE state = 'consumed' AND consumed_step >= :version",
        values,
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
    make_void(connection, (group_id for (group_id,) in void))
    damaged += void_damaged_responses(connection, version, delay_mode)
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
            "they do not belong together; put both back from the same copy, or start under a new name"
        )
    counts = dict(connection.execute("SELECT consumed_step, count(*) FROM groups GROUP BY consumed_step"))
    for step in (step for step in range(version) if counts.get(step, 0) != num_prompts):
        raise JournalError(
            f"global step {step} has consumed {num_prompts} groups, by the journal {counts.get(step, 0)}: it is "
            f"damaged; {REPLACE}"
        )
    last, found = connection.execute("SELECT coalesce(max(group_id), -1), count(*) FROM groups").fetchone()
    if found != last + 1:
        raise JournalError(f"it has {found} of the groups 0 to {last}: it is damaged; {REPLACE}")
    lost = connection.execute(
        "SELECT count(*) FROM groups WHERE state = 'issued' AND issued_version < ?", (version,)
    ).fetchone()[0]
    if lost and delay_mode:
        raise JournalError(
            f"{lost} groups sampled with versions before {version} are lost, which the checkpoint includes: the "
            "journal is older than the checkpoint, or has forgotten their tokens (collector.journal_keep_steps) or "
            "routes (collector.journal_keep_routes); put back the journal that belongs to it, or resume from another "
            "checkpoint"
        )


def groups_with_routes(connection: sqlite3.Connection) -> list[int]:
    """The groups whose routes are in files."""
    return [row[0] for row in connection.execute("SELECT DISTINCT group_id FROM responses WHERE routes IS NOT NULL")]


def restore_groups(connection: sqlite3.Connection, routes: RouteFiles) -> tuple[list[RestoredGroup], int]:
    """The groups that are not consumed, in order of id, and the id after the last one that was used."""
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
    rows = connection.execute(
        "SELECT token_ids, rollout_log_probs, policy_versions, finish_reason, reward, behavior_log_probs, routes"
        " FROM responses WHERE group_id = ? ORDER BY place",
        (group_id,),
    ).fetchall()
    responses = []
    for token_ids, rollout_log_probs, spans, finish_reason, reward, behavior_log_probs, place_of_routes in rows:
        versions, lengths = np.frombuffer(spans, dtype="<i4").reshape(-1, 2).T
        response = Response(
            token_ids=np.frombuffer(token_ids, dtype="<i4"),
            rollout_log_probs=np.frombuffer(rollout_log_probs, dtype="<f4"),
            policy_versions=np.repeat(versions, lengths),
            finish_reason=finish_reason,
            reward=NOT_GRADED if reward is None else reward,
            behavior_log_probs=None if behavior_log_probs is None else np.frombuffer(behavior_log_probs, dtype="<f4"),
            stored_routes=None if place_of_routes is None else routes.verified(group_id, json.loads(place_of_routes)),
        )
        responses.append(response)
    return responses
