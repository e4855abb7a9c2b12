"""A journal that was changed on the disk: nothing that training reads is taken from it without a word."""

import asyncio
import logging
import random
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minpro_megatron.buffer.journal import Journal
from minpro_megatron.buffer.journal_checksums import checksum, seal_groups
from minpro_megatron.buffer.journal_errors import JournalError
from minpro_megatron.buffer.journal_file import _SCHEMA, FILE_NAME, PAGE_BYTES, SCORES
from minpro_megatron.buffer.journal_reader import JournalReader, StoredGroup
from minpro_megatron.buffer.journal_restore import RestoredGroup
from minpro_megatron.buffer.staleness import Beginning
from minpro_megatron.records import Batch, CollectedGroup, IssuedGroup, Response
from tests.support.earlier_journals import make_earlier_format
from tests.support.episodes import as_episode
from tests.support.journal_feeds import NUM_STEPS, make_feed
from tests.support.rollout_fakes import NUM_PROMPTS, collected, issued_groups
from tests.support.stored_runs import behavior, trained, write_run

NUM_FLIPS = 60
GROUP = 4  # of batch 1, which step 1 has consumed
OF_RESPONSE = f"group_id = {GROUP} AND place = 1"
WHERE = {"groups": f"group_id = {GROUP}"} | dict.fromkeys(["responses", *SCORES], OF_RESPONSE)


def columns(*tables: str) -> list[tuple[str, str]]:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(_SCHEMA)
        return [(table, row[1]) for table in tables for row in connection.execute(f"PRAGMA table_info({table})")]


KEYS = "group_id", "place"
# Scores of formats below 8 are in columns of `responses`.
OF_EARLIER_FORMATS = {f"{part}_{what}" for part in ("behavior", "trained") for what in ("log_probs", "checksum")}
COLUMNS = [one for one in columns("groups", "responses", *SCORES) if one[1] not in OF_EARLIER_FORMATS]
# What a step that is undone has made of a response: the next one makes it again.
MADE_AGAIN = [one for one in COLUMNS if one[0] == "trained_scores"]


def changed(value: Any) -> Any:
    """The value with its smallest change: one bit, one character, the next number."""
    match value:
        case bytes():
            place = len(value) // 2
            return value[:place] + bytes([value[place] ^ 1]) + value[place + 1 :]
        case "consumed":
            return "scored"
        case str():
            return value[:-1] + chr(ord(value[-1]) ^ 1)
        case int():
            return value ^ 1
        case float():
            return float(np.nextafter(value, 2))
        case None:
            return None
    raise AssertionError(value)


def damage(run_dir: Path, table: str, column: str) -> bool:
    """Changes that column of one row, and nothing else. Returns whether there was something to change."""
    with closing(sqlite3.connect(run_dir / FILE_NAME)) as connection, connection:
        connection.execute("PRAGMA foreign_keys = OFF")
        (value,) = connection.execute(f"SELECT {column} FROM {table} WHERE {WHERE[table]}").fetchone()
        if value is None:
            return False
        connection.execute(
            f"UPDATE {table} SET {column} = ? WHERE {WHERE[table]}", (1000 if column in KEYS else changed(value),)
        )
    return True


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole")
    write_groups(run_dir)
    return run_dir


@pytest.fixture
def run_dir(whole_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole_run, tmp_path / "run"))


def write_groups(run_dir: Path) -> None:
    """A run of delay mode (1) that was killed in step 2: batches 0 and 1 are consumed, batch 2 is scored, and a group
    of version 2 was issued."""

    async def main() -> None:
        journal = await Journal.open(run_dir)
        for index in range(3):
            issued = issued_groups(range(index * NUM_PROMPTS, (index + 1) * NUM_PROMPTS), index, max(0, index - 1))
            await journal.issue(issued)
            groups = [with_routes(group) for group in issued]
            for group in groups:
                await journal.collect(group, accepted=True)
            await journal.score(index, [(group, behavior(group)) for group in groups])
            if index < 2:
                log_probs = [trained(group) for group in groups]
                await journal.consume(Batch(index=index, groups=groups), [index] * NUM_PROMPTS, (), log_probs)
        await journal.issue(issued_groups([3 * NUM_PROMPTS], 3, 2))
        await journal.close()

    asyncio.run(main())


def with_routes(issued: IssuedGroup) -> CollectedGroup:
    """The second response is an episode, so that it has a value in every column."""
    routes = [np.full((4, 2, 1), place, np.uint8) for place in range(len(issued.sampling_seeds))]
    supports = [np.array([1, 1, 2, 3], np.int32) + place for place in range(len(issued.sampling_seeds))]
    first, second = collected(issued, routes=routes, supports=supports).responses
    return CollectedGroup(issued=issued, responses=[first, as_episode(second, (1, 0, 0, 1))])


def restore(run_dir: Path, version: int, delay_mode: bool) -> tuple[list[RestoredGroup], int]:
    async def main() -> tuple[list[RestoredGroup], int]:
        journal = await Journal.open(run_dir)
        try:
            return await journal.restore(version, NUM_PROMPTS, delay_mode)
        finally:
            await journal.close()

    return asyncio.run(main())


def plain(groups: list[RestoredGroup]) -> dict[int, tuple]:
    """What was restored, in a form that can be compared."""
    return {
        group.group_id: (*group[1:-1], tuple(content(response) for response in group.responses)) for group in groups
    }


def content(response: Response) -> tuple:
    arrays = response.token_ids, response.rollout_log_probs, response.policy_versions, response.behavior_log_probs
    values = [None if array is None else array.tobytes() for array in arrays]
    stored = (response.stored_routes, response.stored_supports)
    digests = [None if one is None else one.sha256 for one in stored]
    return (*values, response.finish_reason, response.reward, *digests)


@pytest.mark.parametrize(("table", "column"), COLUMNS)
def test_a_reader_of_a_changed_value_gets_an_error(run_dir: Path, table: str, column: str) -> None:
    assert damage(run_dir, table, column)
    told = f"{run_dir / FILE_NAME}: group (4|1000).*; the file is damaged: give an undamaged copy of it"
    with JournalReader(run_dir) as reader, pytest.raises(JournalError, match=told):
        list(reader.groups())


@pytest.mark.parametrize(("table", "column"), [one for one in COLUMNS if one not in MADE_AGAIN])
def test_a_changed_value_that_cannot_be_sampled_again_ends_the_start(run_dir: Path, table: str, column: str) -> None:
    """Version 1 is the checkpoint's, and version 0 has sampled the group."""
    assert damage(run_dir, table, column)
    with pytest.raises(
        JournalError, match=f"^{run_dir / FILE_NAME}: .*group (4|1000)[:,].*(checksum|responses)"
    ) as raised:
        restore(run_dir, 1, delay_mode=True)
    assert "restore a copy of the journal that belongs to the checkpoint" in str(raised.value)
    assert "space" not in str(raised.value)


@pytest.mark.parametrize(("table", "column"), [one for one in COLUMNS if one not in MADE_AGAIN])
def test_a_changed_group_is_sampled_again_where_the_mode_allows_it(
    run_dir: Path, whole_run: Path, caplog: pytest.LogCaptureFixture, table: str, column: str
) -> None:
    whole = plain(restore(run_dir, 1, delay_mode=False)[0])
    shutil.copytree(whole_run, run_dir / "again")
    assert damage(run_dir / "again", table, column)
    if (table, column) == ("groups", "group_id"):  # which one it was is not known
        with pytest.raises(JournalError, match=r"the file is damaged|it is damaged|do not belong together"):
            restore(run_dir / "again", 1, delay_mode=False)
        return
    with caplog.at_level(logging.WARNING):
        groups, next_group = restore(run_dir / "again", 1, delay_mode=False)
    found = plain(groups)
    repeated = found.pop(GROUP)
    assert repeated[-1] == ()
    assert (found, next_group) == ({key: value for key, value in whole.items() if key != GROUP}, 9)
    (line,) = caplog.messages
    assert line.startswith(f"{run_dir / 'again' / FILE_NAME}: group {GROUP}")
    assert line.endswith("; it is sampled again")

    async def sample() -> tuple[list[RestoredGroup], int]:
        journal = await Journal.open(run_dir / "again")
        issued = issued_groups([GROUP], -1, 1)[0]
        await journal.issue([issued])
        await journal.collect(with_routes(issued), accepted=True)
        again = await journal.restore(1, NUM_PROMPTS, False)
        await journal.close()
        return again

    whole_again = plain(asyncio.run(sample())[0])
    assert len(whole_again.pop(GROUP)[-1]) == 2
    assert whole_again == found


@pytest.mark.parametrize(("table", "column"), MADE_AGAIN)
def test_log_probs_of_an_undone_update_are_not_needed(run_dir: Path, table: str, column: str) -> None:
    assert damage(run_dir, table, column)
    groups, _ = restore(run_dir, 1, delay_mode=True)
    assert [bool(group.responses) for group in groups] == [True] * 6


@pytest.mark.parametrize("delay_mode", [True, False])
@pytest.mark.parametrize(("table", "column"), COLUMNS)
def test_a_changed_group_that_the_checkpoint_includes_is_not_needed(
    run_dir: Path, whole_run: Path, caplog: pytest.LogCaptureFixture, table: str, column: str, delay_mode: bool
) -> None:
    """Unless what was changed says so itself."""
    whole = plain(restore(run_dir, 2, delay_mode)[0])
    shutil.copytree(whole_run, run_dir / "again")
    assert damage(run_dir / "again", table, column)
    if column in ("group_id", "consumed_step") and table == "groups":
        with pytest.raises(JournalError, match=r"group (4|1000): its prompt, state, versions or global step differ"):
            restore(run_dir / "again", 2, delay_mode)
        return
    assert plain(restore(run_dir / "again", 2, delay_mode)[0]) == whole
    assert [line for line in caplog.messages if "it is not needed" in line] == caplog.messages
    assert len(caplog.messages) == (table == "groups")


def test_groups_of_later_versions_are_forgotten_whatever_they_hold(tmp_path: Path) -> None:
    """Those whose own row is damaged included: intact ones were issued before them at a later version."""

    async def main() -> tuple[list[RestoredGroup], int]:
        journal = await Journal.open(tmp_path)
        await journal.issue(issued_groups([0], 0, 0))
        await journal.issue(issued_groups([1, 2, 3], 1, 1))
        await journal.collect(collected(issued_groups([3], 1, 1)[0]), accepted=True)
        change = "UPDATE groups SET issued_version = 0, source = 'x' WHERE group_id = 3"
        await journal._file.transaction(lambda connection: connection.execute(change))
        found = await journal.restore(0, NUM_PROMPTS, True)
        await journal.close()
        return found

    groups, next_group = asyncio.run(main())
    assert ([group.group_id for group in groups], next_group) == ([0], 1)


def test_a_page_that_holds_a_group_twice_in_place_of_another_is_refused(run_dir: Path) -> None:
    """The number of rows is right, and the checksum of each."""
    file = run_dir / FILE_NAME
    with closing(sqlite3.connect(file)) as connection:
        (root,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'groups'").fetchone()
    content = bytearray(file.read_bytes())
    first = (root - 1) * PAGE_BYTES + 8  # after the header of a leaf: a pointer of two bytes to each row
    content[first + 2 * 7 : first + 2 * 8] = content[first + 2 * 8 : first + 2 * 9]
    file.write_bytes(content)
    with pytest.raises(JournalError, match=r"it has 8 of the groups 0 to 8: it is damaged"):
        restore(run_dir, 1, delay_mode=False)


def test_a_changed_beginning_is_refused(run_dir: Path) -> None:
    async def main(delay_mode: bool) -> list[Beginning]:
        journal = await Journal.open(run_dir)
        try:
            await journal.restore(1, NUM_PROMPTS, delay_mode)
            return await journal.beginnings()
        finally:
            await journal.close()

    beginning = Beginning(2, 1)
    with closing(sqlite3.connect(run_dir / FILE_NAME)) as connection, connection:
        connection.execute("INSERT INTO beginnings VALUES (?, ?, ?)", (*beginning, checksum(*beginning)))
    assert asyncio.run(main(True))[-1] == beginning
    with closing(sqlite3.connect(run_dir / FILE_NAME)) as connection, connection:
        connection.execute("UPDATE beginnings SET first_batch = 3")
    with pytest.raises(JournalError, match=r"the row of beginnings for an extension .* differs from its checksum"):
        asyncio.run(main(True))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("token_ids = x'0000000000000000'", "group 4, response 0: token_ids has 2 values for"),
        (
            "behavior_log_probs = CAST(zeroblob(num_tokens * 4 - 4) || x'0000c07f' AS BLOB)",
            "group 4, response 0: behavior_log_probs has a",
        ),
        (
            "token_ids = CAST(zeroblob(num_tokens * 4 - 4) || x'000000ff' AS BLOB)",
            "group 4, response 0: a token id is negative",
        ),
        ("policy_versions = x'0000000063000000'", "group 4, response 0: its versions cover 99 tokens, but"),
    ],
)
def test_values_that_were_recorded_wrong_are_noticed_as_well(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, change: str, told: str
) -> None:
    """Their checksums agree: they were recorded so. In the format that has all of them in one table."""
    make_earlier_format(run_dir / FILE_NAME, 7)
    monkeypatch.setattr("minpro_megatron.buffer.journal_checksums.part_checksum", lambda *_: None)
    with closing(sqlite3.connect(run_dir / FILE_NAME)) as connection, connection:
        parts = ("arrays", "behavior", "trained", "routes", "supports")
        connection.execute(f"UPDATE responses SET {', '.join(f'{part}_checksum = NULL' for part in parts)}")
        connection.execute(f"UPDATE responses SET {change} WHERE group_id = {GROUP} AND place = 0")
    with JournalReader(run_dir) as reader, pytest.raises(JournalError, match=told):
        list(reader.groups())


def stored(groups: Iterator[StoredGroup]) -> list[str]:
    with np.printoptions(threshold=100_000, precision=9):
        return [repr(group) for group in groups]


def test_no_flipped_byte_of_the_file_changes_what_is_read(
    whole_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each flip of one bit anywhere in the file is refused, costs the sampling of groups again, or changes nothing."""
    whole = (whole_run / FILE_NAME).read_bytes()
    with JournalReader(whole_run) as reader:
        of_step, everything = stored(reader.groups("consumed_step = ?", (1,))), stored(reader.groups())
    restored = plain(restore(Path(shutil.copytree(whole_run, tmp_path / "whole")), 1, delay_mode=False)[0])
    draw, seen = random.Random(5), {"refused": 0, "repeated": 0, "unchanged": 0}
    used = [place for place in range(len(whole)) if any(whole[max(0, place - 8) : place + 8])]
    for number, place in enumerate(draw.choices(used, k=NUM_FLIPS)):
        run_dir = Path(shutil.copytree(whole_run, tmp_path / str(number)))
        flipped = bytes([whole[place] ^ (1 << draw.randrange(8))])
        (run_dir / FILE_NAME).write_bytes(whole[:place] + flipped + whole[place + 1 :])
        check_reader(run_dir, of_step, everything)
        caplog.clear()
        try:
            groups, next_group = restore(run_dir, 1, delay_mode=False)
        except JournalError:
            seen["refused"] += 1
            continue
        finally:
            shutil.rmtree(run_dir)
        found = plain(groups) | dict.fromkeys(range(next_group, max(restored) + 1), ((),))  # issued again
        assert found.keys() == restored.keys(), place
        repeated = [group_id for group_id in found if found[group_id] != restored[group_id]]
        assert all(found[group_id][-1] == () for group_id in repeated), place
        assert len(caplog.messages) >= len(repeated), place
        seen["repeated" if repeated else "unchanged"] += 1
    assert min(seen.values()) > NUM_FLIPS / 10, seen


def check_reader(run_dir: Path, of_step: list[str], everything: list[str]) -> None:
    try:
        with JournalReader(run_dir) as reader:
            found, all_found = stored(reader.groups("consumed_step = ?", (1,))), stored(reader.groups())
    except JournalError:
        return
    assert all(group in everything for group in [*found, *all_found])
    assert len(found) == len(of_step) or found != of_step  # a feed counts them


def test_a_feed_counts_the_groups_of_a_step(tmp_path: Path) -> None:
    write_run(tmp_path / "stored", NUM_STEPS)
    feed = make_feed(tmp_path)
    assert len(feed.batch(1).groups) == NUM_PROMPTS
    with closing(sqlite3.connect(tmp_path / "stored" / FILE_NAME)) as connection, connection:
        connection.execute(f"UPDATE groups SET consumed_step = 0 WHERE group_id = {GROUP}")
        seal_groups(connection)
    with pytest.raises(JournalError, match="it has 2 of the 3 groups of global step 1: the file is damaged, or was"):
        feed.batch(1)
