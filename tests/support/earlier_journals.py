"""Journals as earlier versions wrote them."""

import sqlite3
from contextlib import closing
from pathlib import Path

from minpro_megatron.buffer.journal_checksums import seal_groups
from minpro_megatron.buffer.journal_file import MISSING_COLUMNS, SCORES


def make_earlier_format(path: Path, version: int) -> None:
    """Makes a journal one of format `version`, below 8: its scores are in `responses`, later columns are missing."""
    with closing(sqlite3.connect(path)) as connection, connection:
        for table in SCORES:
            part = table.removesuffix("_scores")
            for column, old in (("log_probs", f"{part}_log_probs"), ("checksum", f"{part}_checksum")):
                key = "new.group_id = responses.group_id AND new.place = responses.place"
                connection.execute(f"UPDATE responses SET {old} = (SELECT {column} FROM {table} AS new WHERE {key})")
            connection.execute(f"DROP TABLE {table}")
        connection.execute("UPDATE groups SET trained = NULL")
        seal_groups(connection)
        connection.execute("ALTER TABLE groups DROP COLUMN trained")
        for column in MISSING_COLUMNS[version]:
            connection.execute(f"ALTER TABLE responses DROP COLUMN {column.split()[0]}")
        connection.execute(f"PRAGMA user_version = {version}")
