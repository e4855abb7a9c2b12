"""What the README states can be looked up: the metrics, the folders, the commands."""

import re
from pathlib import Path

import pytest

from minpro_megatron.monitor.metrics import metric_table

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_metric_table_is_the_registry() -> None:
    assert metric_table() in README


@pytest.mark.parametrize("folder", sorted(path.name for path in (ROOT / "minpro_megatron").glob("*/") if path.is_dir()))
def test_every_folder_has_a_line_in_the_tree(folder: str) -> None:
    if folder != "__pycache__":
        assert re.search(rf"^  {folder}/ +\S", README, re.MULTILINE)


def test_every_make_target_it_names_exists() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)", README)) | set(re.findall(r"^    make ([a-z-]+)", README, re.MULTILINE))
    assert named
    assert named <= targets


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:minpro_megatron|tools|recipes|environment|tests)/[\w./]+)`", README)))
)
def test_every_path_it_names_exists(path: str) -> None:
    assert (ROOT / path).exists()
