"""A node whose roles only serve others ends when those on other nodes have ended, and names its logs by node."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# The real supervisor on one role that stays; the other nodes are done once it has written "up".
NODE = """
import dataclasses, json, os, sys
from pathlib import Path
from minpro_megatron.launch import supervisor

logs = Path(sys.argv[1])
arguments = ["sh", "-c", sys.argv[2]]
command = supervisor.RoleCommand("serve", arguments, dict(os.environ), stays=True, log_name="serve-node-4")
done = lambda: "up" in (logs / "serve-node-4.log").read_text()
outcome = supervisor.Supervisor([command], logs, poll_s=0.03).run(others_are_done=done)
print(json.dumps(dataclasses.asdict(outcome), default=str))
"""


@pytest.mark.parametrize(
    ("script", "status", "failures"),
    [("sleep 0.2; echo up; sleep 60", 0, 0), ("sleep 0.05; exit 3", 1, 1), ("sleep 0.05", 1, 1)],
)
def test_a_serving_node_stays_until_the_others_are_done(
    tmp_path: Path, script: str, status: int, failures: int
) -> None:
    command = [sys.executable, "-c", NODE, str(tmp_path / "logs"), script]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    outcome = json.loads(ended.stdout)
    assert (outcome["status"], len(outcome["failures"])) == (status, failures)
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["serve-node-4.log"]
