"""What a journal holds is read as it was written, also while its run goes on, and nothing in the run folder changes."""

import asyncio
import json
import math
import sqlite3
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import msgspec
import numpy as np
import pytest

from minpro_megatron.batching.stored_arrays import read_array
from minpro_megatron.buffer.journal import Journal
from minpro_megatron.buffer.journal_errors import JournalError
from minpro_megatron.buffer.journal_reader import JournalReader, StoredGroup
from minpro_megatron.commands.show import main as show_rollouts
from minpro_megatron.records import CollectedGroup, EvaluationResult
from tests.support.journals import files_of
from tests.support.rollout_fakes import NUM_PROMPTS, RESPONSES, collected, issued_groups
from tests.support.stored_runs import StoredRun, behavior, trained, with_versions, write_run


def check_same(stored: StoredGroup, group: CollectedGroup) -> None:
    issued = group.issued
    assert (stored.group_id, stored.issued_version) == (issued.group_id, issued.policy_version)
    assert (stored.prompt_id, stored.source) == (issued.prompt.id, issued.prompt.source)
    assert stored.prompt_token_ids.tolist() == issued.prompt_token_ids.tolist()
    assert [response.sampling_seed for response in stored.responses] == issued.sampling_seeds
    for found, response in zip(stored.responses, group.responses, strict=True):
        for name in ("token_ids", "policy_versions", "rollout_log_probs"):
            np.testing.assert_array_equal(getattr(found, name), getattr(response, name), strict=True)
        assert (found.reward, found.finish_reason) == (response.reward, response.finish_reason)
        assert found.num_tokens == len(response.token_ids)


def test_groups_are_read_as_they_were_written(tmp_path: Path) -> None:
    run = write_run(tmp_path, change=lambda group: with_versions(group, [0, 0, 1, 1, 1, 2]))
    with JournalReader(tmp_path) as reader:
        *stored, issued = reader.groups()
        rows = reader.rows()
    for found, group in zip(stored, run.groups, strict=True):
        check_same(found, group)
        assert (found.oldest_version, found.newest_version) == (0, 2)
    assert [(group.state, group.consumed_step, group.staleness) for group in stored] == (
        [("consumed", 0, 0)] * NUM_PROMPTS
        + [("consumed", 1, 1)] * NUM_PROMPTS
        + [("collected", None, None)] * NUM_PROMPTS
    )
    for found, group in zip(stored, [group for batch in run.steps for group in batch.groups], strict=False):
        for response, scores, updated in zip(found.responses, behavior(group), trained(group), strict=True):
            np.testing.assert_array_equal(response.behavior_log_probs, scores, strict=True)
            np.testing.assert_array_equal(response.trained_log_probs, updated, strict=True)
            ratios = response.ratios
            assert ratios is not None
            assert np.isnan(ratios[0])
            np.testing.assert_allclose(ratios[1:], np.e, rtol=1e-5)
    assert stored[-1].responses[0].ratios is None
    assert (issued.state, issued.responses, issued.mean_reward) == ("issued", [], None)
    for row, group in zip(rows, [*stored, issued], strict=True):
        lengths = [response.num_tokens for response in group.responses]
        assert (row.num_responses, row.num_tokens, row.mean_reward) == (len(lengths), sum(lengths), group.mean_reward)
        assert (row.state, row.oldest_version) == (group.state, group.oldest_version)


@pytest.mark.parametrize(("rewards", "average"), [([math.nan, 0.5], 0.5), ([math.nan, math.nan], None)])
def test_a_reward_that_is_missing_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rewards: list[float], average: float | None
) -> None:
    graded = collected(issued_groups([0])[0])
    responses = [
        msgspec.structs.replace(response, reward=reward)
        for response, reward in zip(graded.responses, rewards, strict=True)
    ]
    group = msgspec.structs.replace(graded, responses=responses, grading_problem="grader died")

    async def write() -> None:
        journal = await Journal.open(tmp_path)
        await journal.issue([group.issued])
        await journal.collect(group, accepted=False)
        assert (await journal.totals()).groups_not_graded == 1
        await journal.close()

    asyncio.run(write())
    with JournalReader(tmp_path) as reader:
        (row,), (stored,) = reader.rows(), list(reader.groups())
    assert (row.state, row.mean_reward, stored.mean_reward) == ("dropped", average, average)
    assert [response.reward for response in stored.responses] == [None, None if average is None else average]
    assert show_rollouts([str(tmp_path), "--group", "0"]) == 0
    assert "response 0, not graded, " in capsys.readouterr().out
    assert show_rollouts([str(tmp_path), "--group", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["responses"][0]["reward"] is None


def test_rows_are_chosen_by_what_they_show(tmp_path: Path) -> None:
    write_run(tmp_path)
    with JournalReader(tmp_path) as reader:
        everything = reader.rows()
        high = [row.group_id for row in everything if row.mean_reward is not None and row.mean_reward > 0.4]
        assert 0 < len(high) < len(everything)
        assert [row.group_id for row in reader.rows("mean_reward > ?", (0.4,))] == high
        assert [row.group_id for row in reader.rows("consumed_step = ?", (1,), limit=2)] == [3, 4]
        assert [group.group_id for group in reader.groups("state = ?", ("issued",))] == [9]


def test_steps_say_what_each_consumed(tmp_path: Path) -> None:
    async def prune(journal: Journal, run: StoredRun) -> None:
        await journal.prune(before_step=1)

    run = write_run(tmp_path, 3, while_open=prune)
    with JournalReader(tmp_path) as reader:
        steps = reader.steps()
        first = next(reader.groups("consumed_step = 0"))
    assert list(steps) == [0, 1, 2]
    for index, step in steps.items():
        responses = [response for group in run.steps[index].groups for response in group.responses]
        assert (step.num_groups, step.smallest_group, step.largest_group) == (NUM_PROMPTS, RESPONSES, RESPONSES)
        assert step.longest_response == max(len(response.token_ids) for response in responses)
        assert (step.longest_prompt, step.num_responses, step.num_routes) == (2, len(responses), 0)
        assert step.num_whole == (len(responses) if index else 0)
        assert (step.smallest_staleness, step.largest_staleness) == (index, index)
    response = first.responses[0]
    assert response.num_tokens > 0
    assert response.token_ids is response.policy_versions is response.behavior_log_probs is response.ratios is None


def test_routes_and_evaluations(tmp_path: Path) -> None:
    routes = np.arange(24, dtype=np.uint8).reshape(4, 3, 2)
    result = EvaluationResult(
        policy_version=0, pass_at_1=0.25, standard_error=0.1,
        mean_reward=0.25, not_graded=0, num_prompts=2, samples_per_prompt=2,
        mean_response_tokens=2.5, wall_time_s=0.1,
    )  # fmt: skip

    def with_routes(group: CollectedGroup) -> CollectedGroup:
        first, *others = group.responses
        return msgspec.structs.replace(
            group, responses=[msgspec.structs.replace(first, routed_experts=routes + group.issued.group_id), *others]
        )

    async def evaluate(journal: Journal, run: StoredRun) -> None:
        await journal.evaluate(result)

    write_run(tmp_path, change=with_routes, while_open=evaluate)
    with JournalReader(tmp_path) as reader:
        group = next(reader.groups("group_id = 2"))
        stored = reader.stored_routes(2, group.responses[0])
        assert stored is not None
        np.testing.assert_array_equal(read_array(stored), routes + 2, strict=True)
        assert reader.stored_routes(2, group.responses[1]) is None
        assert reader.evaluations() == [result]
        assert reader.steps()[0].num_routes == NUM_PROMPTS
        (tmp_path / "routes" / "2.bin").write_bytes(b"x" * 100)
        with pytest.raises(JournalError, match="damaged"):
            reader.stored_routes(2, group.responses[0])


def test_a_journal_at_rest_is_left_as_it_is(tmp_path: Path) -> None:
    write_run(tmp_path)
    before = files_of(tmp_path)
    with JournalReader(tmp_path) as reader:
        assert len(list(reader.groups())) == 10
        assert not reader.is_live
    assert files_of(tmp_path) == before


def test_a_copy_is_taken_again_if_the_run_wrote_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.sqlite"
    path.write_bytes(b"file")
    path.with_name("journal.sqlite-wal").write_bytes(b"log")
    states = iter([(1, 4, b"a"), (2, 4, b"a"), (2, 4, b"a"), (2, 4, b"b"), (2, 4, b"b"), (2, 4, b"b")])
    monkeypatch.setattr(JournalReader, "_file_state", lambda self: next(states))
    reader = JournalReader.__new__(JournalReader)
    reader.path, reader._log, reader._stack = path, path.with_name("journal.sqlite-wal"), ExitStack()
    with reader:
        assert reader._snapshot().read_bytes() == b"file"
    assert list(states) == []
    states = count()
    with ExitStack() as reader._stack, pytest.raises(JournalError, match="keeps writing to it; try again"):
        reader._snapshot()


def test_what_is_no_journal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="no such file; give a run folder"):
        JournalReader(tmp_path)
    path = tmp_path / "journal.sqlite"
    path.write_text("this is no database\n" * 100)
    with pytest.raises(JournalError, match="not a database"):
        JournalReader(tmp_path)
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 1")
    with pytest.raises(JournalError, match="format 1; this version reads 8"):
        JournalReader(tmp_path)


def test_a_damaged_page_is_an_error_of_the_journal(tmp_path: Path) -> None:
    write_run(tmp_path)
    path = tmp_path / "journal.sqlite"
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    with JournalReader(path) as reader, pytest.raises(JournalError, match="damaged"):
        reader.rows()
