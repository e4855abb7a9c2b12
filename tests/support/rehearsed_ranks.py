"""Rehearsals for tests: the command in a process of its own, and ranks as it describes them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minpro_megatron.errors import UserError
from minpro_megatron.rehearsal.record import Phase, RankRehearsal
from minpro_megatron.rehearsal.transformer_engine.files import find_folder

ROOT = Path(__file__).resolve().parents[2]


def _absent() -> str:
    try:
        find_folder()
    except UserError as error:
        return str(error)
    return ""


needs_transformer_engine = pytest.mark.skipif(bool(_absent()), reason=_absent() or "it is there")


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """This Python with the arguments, at the root of the repository."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def rehearse(*arguments: str, program: tuple[str, ...] = ("-m", "minpro_megatron", "rehearse")) -> list[RankRehearsal]:
    done = run_python(*program, *arguments, "--json")
    assert done.stdout, done.stderr[-2000:]
    assert done.stderr == ""
    return [RankRehearsal.from_json(one) for one in json.loads(done.stdout)]


def rehearsed_rank(**changes: Any) -> RankRehearsal:
    """A rank whose highest phase has 50 GB, and that has no problem."""
    phases = [
        Phase("build", peak={"cuda": 40 * 10**9}),
        Phase("update", peak={"cuda": 50 * 10**9}),
        Phase("update > log-probs backward", peak={"cuda": 50 * 10**9}),
    ]
    values: dict[str, Any] = {
        "recipe": "recipes.qwen3_8b:minpro",
        "rank": 0,
        "place": "data 0/2",
        "problems": [],
        "phases": phases,
        "collectives": [],
        "host_reads": [],
        "components": [],
        "process_peak_bytes": 0,
        "seconds": 1.0,
    }
    return RankRehearsal(**(values | changes))
