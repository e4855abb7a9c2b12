"""The command tools/replay_rollouts.py as a process."""

import subprocess
import sys
from pathlib import Path

from tests.support.replay_options import options
from tests.support.replay_rows import GOOD, write_rows

__all__ = ["options"]  # a fixture

ROOT = Path(__file__).resolve().parents[3]


def test_the_command_tells_each_problem_in_a_line_and_exits_with_2(options, tmp_path):
    file = write_rows(tmp_path / "bad.jsonl", GOOD | {"reward": None}, GOOD | {"loss_mask": [1]})
    names = {"--model": options.model, "--rollouts": file, "--output": options.output, "--objective": "minpro"}
    command = [sys.executable, "tools/replay_rollouts.py", *(str(part) for pair in names.items() for part in pair)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"checking the rows of {file}",
        f"error: {file}: line 1: reward = null: Expected float, got null",
        f"error: {file}: line 2: loss_mask: has 1 numbers for 3 response_ids",
    ]
    assert not options.output.exists()
