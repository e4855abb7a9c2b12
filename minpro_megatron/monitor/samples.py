"""The latest rollouts of a run, with tokens and importance ratios, for the report."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minpro_megatron.files.json_files import read_json_lines
from minpro_megatron.files.replacement import replace_file_in

FILE_NAME = "samples.jsonl"
MAX_SAMPLES = 40
MAX_TOKENS = 1000  # of one response


def write_samples(run_dir: Path, samples: Sequence[Mapping[str, Any]]) -> None:
    """Replaces the run's samples by `samples`."""
    replace_file_in(Path(run_dir), FILE_NAME, "".join(f"{json.dumps(sample)}\n" for sample in samples))


def read_samples(run_dir: Path) -> list[dict[str, Any]]:
    """The last MAX_SAMPLES samples of the run."""
    return read_json_lines(Path(run_dir) / FILE_NAME)[-MAX_SAMPLES:]
