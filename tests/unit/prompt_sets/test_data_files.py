"""Where the rows of a data set come from: files, folders, the hub; read in a stream, damage named."""

from itertools import islice
from pathlib import Path

import pyarrow as pa
import pytest
from huggingface_hub import constants
from pyarrow import parquet

from minpro_megatron.prompt_sets.data_files import choose_files, count_rows, find_files, read_rows
from minpro_megatron.prompt_sets.parquet_files import BATCH_ROWS, READ_BYTES
from minpro_megatron.prompt_sets.rows import DamagedRow
from tests.support.data_hub import data_hub

SHARDS = ["t-00000-of-00002.jsonl", "t-00001-of-00002.jsonl"]


def write_parquet(path: Path, num_rows: int, **columns: list[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table({"number": list(range(num_rows)), "more": ["x"] * num_rows, **columns}), path)
    return path


@pytest.mark.parametrize(
    ("names", "pattern", "chosen"),
    [
        (["README.md", "data/train.parquet"], "", ["data/train.parquet"]),
        (
            ["t-00001-of-00002.jsonl", "t-00000-of-00002.jsonl"],
            "",
            ["t-00000-of-00002.jsonl", "t-00001-of-00002.jsonl"],
        ),
        (["main/train-0.parquet", "main/test-0.parquet", "x/test-0.parquet"], "main/te*", ["main/test-0.parquet"]),
    ],
)
def test_data_files_are_chosen(names: list[str], pattern: str, chosen: list[str]) -> None:
    assert choose_files(names, pattern, "owner/name") == chosen


@pytest.mark.parametrize(
    ("names", "pattern", "problem"),
    [
        (["en/t-00000-of-00001.jsonl", "cn/t-00000-of-00001.jsonl"], "", "several data sets; name one .*cn/t-0"),
        (["README.md"], "", "no data file matches; there is nothing that ends with .parquet or .jsonl or .json"),
        (["train.jsonl"], "test*", "no data file matches; there is train.jsonl"),
    ],
)
def test_a_choice_that_is_not_clear_says_what_there_is(names: list[str], pattern: str, problem: str) -> None:
    with pytest.raises(ValueError, match=f"^--input owner/name: {problem}"):
        choose_files(names, pattern, "owner/name")


def test_files_and_folders_on_disk(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "set" / "data" / "train.parquet", 2)
    assert find_files(str(file)) == find_files(str(tmp_path / "set")) == find_files(f"{tmp_path}/set:data/*") == [file]
    for missing in ("none.jsonl", str(tmp_path / "none"), "a/b.parquet"):
        with pytest.raises(ValueError, match=f"--input {missing}: no such file; give a file, a folder or a hub"):
            find_files(missing)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_parquet(tmp_path / "served" / "main" / "train.parquet", 3)
    write_parquet(tmp_path / "served" / "main" / "test.parquet", 5)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with data_hub("owner/name", tmp_path / "served") as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield tmp_path


def test_a_hub_id_is_downloaded(hub: Path) -> None:
    (path,) = find_files("owner/name:main/te*.parquet")
    assert path.is_relative_to(hub / "cache")
    assert [row["number"] for _, row in read_rows(path, ["number"])] == list(range(5))
    with pytest.raises(ValueError, match=r"several data sets; .*main/test.parquet, main/train.parquet"):
        find_files("owner/name")


def test_what_the_hub_does_not_have_is_one_line(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^--input owner/other: not a file here, .*404.*; download it"):
        find_files("owner/other")
    with pytest.raises(ValueError, match=r"not a file here"):
        find_files("owner/name:main/te*", revision="none")


def test_parquet_is_read_in_order_and_only_where_needed(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", BATCH_ROWS + 10)
    assert count_rows(path) == BATCH_ROWS + 10
    read = list(read_rows(path, ["number", "not there"]))
    assert [number for number, _ in read] == list(range(1, BATCH_ROWS + 11))
    assert [row for _, row in read] == [{"number": number} for number in range(BATCH_ROWS + 10)]


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """One row group of 19 MB, as pandas would write it."""
    texts = pa.array([f"{number:0800d}" for number in range(24_000)])
    path = tmp_path / "large.parquet"
    parquet.write_table(pa.table({"text": texts}), path, use_dictionary=False, compression="none")
    del texts
    before, largest = pa.total_allocated_bytes(), 0
    for number, _ in islice(read_rows(path, ["text"]), 3 * BATCH_ROWS):
        if number % 500 == 0:
            largest = max(largest, pa.total_allocated_bytes() - before)
    assert 0 < largest < 2 * READ_BYTES + 2 * BATCH_ROWS * 800 < path.stat().st_size / 2


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 and nothing more")
    for read in (count_rows, lambda path: list(read_rows(path, ["number"]))):
        with pytest.raises(ValueError, match=f"^{path}: not a parquet file .*; download it again"):
            read(path)
    whole = write_parquet(path, 20_000, text=[f"{n:050d}" for n in range(20_000)]).read_bytes()
    broken = bytearray(whole)
    broken[len(whole) // 4 : len(whole) // 2] = bytes(len(whole) // 2 - len(whole) // 4)
    path.write_bytes(broken)
    with pytest.raises(DamagedRow, match=rf"^{path}, row \d+, field \(whole row\): cannot be read"):
        list(read_rows(path, ["text"]))
