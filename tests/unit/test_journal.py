"""The journal: every group's states in order, each exactly once, and a damaged transition changes nothing."""

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from minpro_megatron.records import Batch, EvaluationResult
from minpro_megatron.rollout.journal import FILE_NAME, Journal, JournalError
from minpro_megatron.rollout.prompts import PromptStream
from tests.unit.rollout_fakes import NUM_PROMPTS, RESPONSES, collected, run_config, scores_of, tokenized_prompts


def in_journal(run_dir: Path, use: Callable[[Journal], Awaitable[None]]) -> None:
    async def main() -> None:
        journal = await Journal.open(run_dir)
        try:
            await use(journal)
        finally:
            await journal.close()

    asyncio.run(main())


def batch(index: int, run_dir: Path, version: int = 0) -> Batch:
    issued = PromptStream(tokenized_prompts(9), run_config(run_dir)).groups(index, version)
    return Batch(index=index, groups=[collected(group) for group in issued])


def states(run_dir: Path) -> list[tuple[str, int | None, int | None]]:
    with sqlite3.connect(run_dir / FILE_NAME) as connection:
        return connection.execute("SELECT state, consumed_step, staleness FROM groups ORDER BY group_id").fetchall()


def test_a_batch_goes_through_its_states(tmp_path: Path) -> None:
    made = batch(1, tmp_path)
    result = EvaluationResult(
        policy_version=0, pass_at_1=0.25, standard_error=0.1, num_prompts=2, samples_per_prompt=2,
        mean_response_tokens=2.5, wall_time_s=0.1,
    )  # fmt: skip

    async def use(journal: Journal) -> None:
        await journal.issue([group.issued for group in made.groups])
        await journal.collect(made)
        await journal.score(made, scores_of(made))
        await journal.consume(made, 1, [1] * NUM_PROMPTS)
        await journal.publish(1)
        await journal.evaluate(result)
        totals = await journal.totals()
        assert (totals.groups_issued, totals.groups_consumed, totals.groups_dropped) == (NUM_PROMPTS, NUM_PROMPTS, 0)
        assert (totals.smallest_staleness, totals.largest_staleness, totals.versions_published) == (1, 1, 1)
        assert totals.evaluations == [result]

    in_journal(tmp_path, use)
    assert states(tmp_path) == [("consumed", 1, 1)] * NUM_PROMPTS
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        rows = connection.execute(
            "SELECT token_ids, rollout_log_probs, policy_versions, behavior_log_probs, sampling_seed, reward"
            " FROM responses ORDER BY group_id, place"
        ).fetchall()
    stored = [response for group in made.groups for response in group.responses]
    assert len(rows) == len(stored) == NUM_PROMPTS * RESPONSES
    for (tokens, rollout, versions, behavior, seed, reward), response in zip(rows, stored, strict=True):
        assert np.frombuffer(tokens, "<i4").tolist() == response.token_ids.tolist()
        assert rollout == behavior == response.rollout_log_probs.tobytes()
        assert np.frombuffer(versions, "<i4").tolist() == [0, len(response.token_ids)]
        assert reward == seed % 2


def test_nothing_happens_twice_or_out_of_order(tmp_path: Path) -> None:
    made = batch(0, tmp_path)
    issued = [group.issued for group in made.groups]

    async def refused(action: Awaitable[None]) -> None:
        with pytest.raises(JournalError):
            await action

    async def use(journal: Journal) -> None:
        await refused(journal.collect(made))
        await journal.issue(issued)
        await refused(journal.issue(issued))
        await refused(journal.score(made, scores_of(made)))
        await journal.collect(made)
        await refused(journal.collect(made))
        await refused(journal.consume(made, 0, [0] * NUM_PROMPTS))
        await journal.score(made, scores_of(made))
        await refused(journal.score(made, scores_of(made)))
        await journal.consume(made, 0, [0] * NUM_PROMPTS)
        await refused(journal.consume(made, 0, [0] * NUM_PROMPTS))

    in_journal(tmp_path, use)
    assert states(tmp_path) == [("consumed", 0, 0)] * NUM_PROMPTS


def test_a_failed_transaction_leaves_nothing_behind(tmp_path: Path) -> None:
    made = batch(0, tmp_path)

    async def use(journal: Journal) -> None:
        await journal.issue([group.issued for group in made.groups[:-1]])  # the last one was never issued
        with pytest.raises(JournalError, match=r"batch 0 was not issued.*2 of 3 rows"):
            await journal.collect(made)

    in_journal(tmp_path, use)
    assert states(tmp_path) == [("issued", None, None)] * (NUM_PROMPTS - 1)


def test_a_folder_with_a_journal_is_refused(tmp_path: Path) -> None:
    async def nothing(journal: Journal) -> None:
        pass

    in_journal(tmp_path, nothing)
    with pytest.raises(JournalError, match="give another name, or delete"):
        in_journal(tmp_path, nothing)


def test_mixed_versions_are_kept_as_spans(tmp_path: Path) -> None:
    from minpro_megatron.rollout.journal import _spans

    assert _spans(np.asarray([3, 3, 3, 4, 5, 5], dtype=np.int32)).tolist() == [[3, 3], [4, 1], [5, 2]]
    assert _spans(np.asarray([0], dtype=np.int32)).tolist() == [[0, 1]]
