"""Loss masks and turns in the journal; journals from before there were any; log-probs of given tokens."""

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console

from minpro_megatron.actor.start_gate import refuse_different_models
from minpro_megatron.batching.sequences import behavior_record, sampled_tokens, token_sequences, trained_step
from minpro_megatron.buffer.journal import Journal
from minpro_megatron.buffer.journal_errors import JournalError
from minpro_megatron.buffer.journal_file import FILE_NAME, MISSING_COLUMNS, SCHEMA_VERSION
from minpro_megatron.buffer.journal_reader import JournalReader, StoredGroup
from minpro_megatron.buffer.scores import WrongScores, check_scores, check_trained
from minpro_megatron.config.loss import LossConfig
from minpro_megatron.errors import RunFailed
from minpro_megatron.feed.journal_feed import JournalFeed
from minpro_megatron.records import Batch, Response, decode, encode
from minpro_megatron.replay.rollouts import read_rollouts
from minpro_megatron.replay.stored_groups import export_rows
from minpro_megatron.report.rollout_tables import print_group
from tests.support.batches import make_batch
from tests.support.earlier_journals import make_earlier_format
from tests.support.episodes import with_given_tokens
from tests.support.journals import in_journal
from tests.support.rollout_fakes import NUM_PROMPTS
from tests.support.stored_runs import StoredRun, behavior, trained, write_run

MASK = [1, 1, 0, 0, 1, 0, 1]


def check_same(found: Response, response: Response) -> None:
    for name in ("token_ids", "policy_versions", "rollout_log_probs", "loss_mask"):
        np.testing.assert_array_equal(getattr(found, name), getattr(response, name), err_msg=name)
    assert found.turns == response.turns


def write_episodes(run_dir: Path) -> StoredRun:
    return write_run(run_dir, change=with_given_tokens)


def test_masks_and_turns_are_restored_and_read_as_they_were_written(tmp_path: Path) -> None:
    run = write_episodes(tmp_path)
    with JournalReader(tmp_path) as reader:
        stored = list(reader.groups("state <> 'issued'"))
    for found, group in zip(stored, run.groups, strict=True):
        assert (found.oldest_version, found.newest_version) == (0, 0)
        for response, written in zip(found.responses, group.responses, strict=True):
            for name in ("token_ids", "policy_versions", "rollout_log_probs", "loss_mask"):
                np.testing.assert_array_equal(getattr(response, name), getattr(written, name))
            assert response.turns == written.turns
        assert [response.num_given for response in found.responses] == [3, 0]
        assert len(found.responses[0].turns) == 3

    async def use(journal: Journal) -> None:
        restored, _ = await journal.restore(0, NUM_PROMPTS, delay_mode=True)
        ready = {group.group_id: group for group in restored if group.responses}
        assert len(ready) == len(run.groups)
        for group in run.groups:
            for found, written in zip(ready[group.issued.group_id].responses, group.responses, strict=True):
                check_same(found, written)

    in_journal(tmp_path, use)


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ("loss_mask = x'01010100010001'", "versions or loss mask differ"),
        ("loss_mask = NULL", "versions or loss mask differ"),
        ("turns = replace(turns, '0.5', '0.6')", "reward or turns differ"),
        ("turns = NULL", "reward or turns differ"),
    ],
)
def test_a_changed_mask_or_turn_is_noticed(tmp_path: Path, change: str, seen: str) -> None:
    write_episodes(tmp_path)
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection, connection:
        connection.execute(f"UPDATE responses SET {change} WHERE group_id = 1 AND place = 0")
    with JournalReader(tmp_path) as reader, pytest.raises(JournalError, match=f"group 1, response 0: .*{seen}"):
        list(reader.groups())


@pytest.mark.parametrize("version", MISSING_COLUMNS)
def test_a_journal_of_an_earlier_format_is_read_and_resumed(tmp_path: Path, version: int) -> None:
    run = write_run(tmp_path / "old")
    path = tmp_path / "old" / FILE_NAME
    with JournalReader(path) as reader:
        written = list(reader.groups())
    make_earlier_format(path, version)
    before = path.read_bytes()
    with JournalReader(path) as reader:
        stored = list(reader.groups())
        check_same_scores(stored, written)
        assert len(reader.rows()) == len(run.groups) + 1
        assert [step.num_whole for step in reader.steps().values()] == [2 * NUM_PROMPTS] * 2
    assert path.read_bytes() == before
    for response in (response for group in stored for response in group.responses):
        assert (response.loss_mask, response.turns, response.supports) == (None, [], None)

    async def use(journal: Journal) -> None:
        restored, _ = await journal.restore(0, NUM_PROMPTS, delay_mode=True)
        assert [len(group.responses) for group in restored] == [2] * 3 * NUM_PROMPTS + [0]

    shutil.copytree(tmp_path / "old", tmp_path / "again")
    in_journal(tmp_path / "again", use)
    with closing(sqlite3.connect(tmp_path / "again" / FILE_NAME)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
    with JournalReader(tmp_path / "again") as reader:
        check_same_scores(list(reader.groups()), written)


def check_same_scores(found: list[StoredGroup], written: list[StoredGroup]) -> None:
    for group, expected in zip(found, written, strict=True):
        for response, other in zip(group.responses, expected.responses, strict=True):
            for name in ("behavior_log_probs", "trained_log_probs"):
                np.testing.assert_array_equal(getattr(response, name), getattr(other, name), strict=True)


@pytest.mark.parametrize("version", MISSING_COLUMNS)
def test_groups_scored_in_an_earlier_format_are_trained_on_in_this_one(tmp_path: Path, version: int) -> None:
    """A step that is trained again after the upgrade has new log-probs of the update, and the old scores."""
    run = write_run(tmp_path)
    make_earlier_format(tmp_path / FILE_NAME, version)
    later = [[log_probs + np.float32(1) for log_probs in trained(group)] for group in run.steps[0].groups]

    async def use(journal: Journal) -> None:
        await journal.restore(0, NUM_PROMPTS, delay_mode=True)
        await journal.consume(run.steps[0], [0] * NUM_PROMPTS, (), later)

    in_journal(tmp_path, use)
    with JournalReader(tmp_path) as reader:
        groups = list(reader.groups("consumed_step = 0"))
    for group, of_run, expected in zip(groups, run.steps[0].groups, later, strict=True):
        for response, scores, log_probs in zip(group.responses, behavior(of_run), expected, strict=True):
            np.testing.assert_array_equal(response.behavior_log_probs, scores)
            np.testing.assert_array_equal(response.trained_log_probs, log_probs)


def test_pruning_keeps_the_turns(tmp_path: Path) -> None:
    write_episodes(tmp_path)

    async def use(journal: Journal) -> None:
        await journal.prune(2)

    in_journal(tmp_path, use)
    with JournalReader(tmp_path) as reader:
        first = next(reader.groups()).responses[0]
    assert (first.token_ids, first.loss_mask) == (None, None)
    assert [turn.given_tokens for turn in first.turns] == [2, 1, 0]


def episode_batch() -> Batch:
    batch = make_batch()
    return decode(Batch, encode(Batch(index=4, groups=[with_given_tokens(group, MASK) for group in batch.groups])))


def test_given_tokens_are_not_trained_on_and_have_no_staleness() -> None:
    for of_group, group in zip(token_sequences(episode_batch(), LossConfig(), 8), episode_batch().groups, strict=True):
        sequence = of_group[0]
        assert sequence.loss_mask.tolist() == MASK
        assert sequence.loss_mask.dtype == np.float32
        assert sequence.staleness is not None
        assert sequence.staleness.tolist() == [4 * one for one in MASK]
        assert of_group[1].num_trained_tokens == len(group.responses[1].token_ids)
        assert (group.oldest_version, group.newest_version) == (0, 0)
    masked = token_sequences(episode_batch(), LossConfig(equal_reward_groups="mask"), 8)
    assert [group[0].num_trained_tokens for group in masked] == [4, 0, 4]


def test_scores_of_given_tokens_are_none_at_all() -> None:
    """Whatever the model said of them; and the collector takes no number that is not one for a sampled token."""
    batch, mask = episode_batch(), np.asarray(MASK)
    sampled = sampled_tokens(batch)
    assert sampled[: len(MASK)].tolist() == [bool(one) for one in MASK]
    values = np.where(sampled, -1.0, 99.0).astype(np.float32)
    record = behavior_record(batch, 0, values)
    first = record.log_probs[0][0]
    assert np.isnan(first[mask == 0]).all()
    assert (first[mask == 1] == -1).all()
    check_scores(batch, record)
    check_trained(batch, trained_step(batch, 0, [values]))
    broken = msgspec.structs.replace(record, log_probs=[[scores.copy() for scores in g] for g in record.log_probs])
    broken.log_probs[0][0][0] = np.nan
    with pytest.raises(WrongScores, match="response 0: a value is not finite"):
        check_scores(batch, broken)


def test_exported_rollouts_are_masked_and_can_be_replayed(tmp_path: Path) -> None:
    write_episodes(tmp_path)
    with JournalReader(tmp_path) as reader:
        rows = [row for group in reader.groups("state = 'consumed'") for row in export_rows(reader, group)]
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    first, second, *_ = read_rollouts(path, vocab_size=1000, needs_rollout_log_probs=True)
    assert first.loss_mask.tolist() == MASK
    assert (first.behavior_log_probs[np.asarray(MASK) == 0] == 0).all()
    assert second.loss_mask.all()


def test_a_journal_feeds_its_masks(tmp_path: Path) -> None:
    run = write_episodes(tmp_path)
    feed = object.__new__(JournalFeed)
    feed._prompt_text, feed._vocabulary_size, feed._routes, feed._supports = lambda ids: "", 1000, False, False
    with JournalReader(tmp_path) as reader:
        for stored, group in zip(reader.groups("state = 'consumed'"), run.groups, strict=False):
            for found, written in zip(feed._group(reader, stored, 0).responses, group.responses, strict=True):
                check_same(found, written)


def test_show_names_given_tokens_and_turns(tmp_path: Path) -> None:
    write_episodes(tmp_path)
    with JournalReader(tmp_path) as reader:
        group = next(reader.groups())
    console = Console(record=True, width=200, color_system="truecolor", force_terminal=True)
    print_group(console, group, group.responses[:1], None)
    lines = console.export_text(styles=False).splitlines()
    assert any(
        "2 of version 0 then 2 given then 1 of version 0 then 1 given then 1 of version 0" in one for one in lines
    )
    assert "turn 1: 2 sampled, 2 given, 1 tool calls, 0.50 s" in lines
    assert "turn 3: 1 sampled, 0 given" in lines
    assert sum(" given " in line and not line.startswith(("response", "turn")) for line in lines) == 3


def test_the_start_gate_compares_sampled_tokens() -> None:
    batch = episode_batch()
    sequences = [one for group in token_sequences(batch, LossConfig(), 8) for one in group]
    sampled = sampled_tokens(batch)
    scores = np.concatenate([sequence.rollout_log_probs for sequence in sequences])
    assert np.isnan(scores).sum() == 3 * 3
    refuse_different_models(sequences, scores, sampled)
    with pytest.raises(RunFailed, match="differ from the trainer's by 1 nats"):
        refuse_different_models(sequences, scores - 1, sampled)
