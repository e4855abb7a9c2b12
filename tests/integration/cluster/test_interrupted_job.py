"""Ctrl-C ends a job that `minpro submit` runs on this machine, at once and in order."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minpro_megatron.cluster.paths import CHECKOUT

# The job's process: what `minpro node` does with the signal that it gets from its launcher.
NODE = """#!/bin/sh
trap 'echo ended in order > ended; exit 1' TERM
echo $$ > started
while true; do sleep 0.1; done
"""
SUBMIT = """
import signal, sys
from pathlib import Path
from minpro_megatron.cluster.job_files import JobFiles
from minpro_megatron.cluster.nemo import run_here
from minpro_megatron.cluster.profile import read_profile

signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal; a process in the background ignores it
profile = read_profile(Path(sys.argv[1]), [f"workspace={sys.argv[2]}", f"python={sys.argv[2]}/python_node"])
try:
    run_here(JobFiles(name="mine", run_json="{}", topology_json="{}", num_nodes=1), profile)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.long
@pytest.mark.timeout(120)
def test_an_interrupt_ends_the_job_and_then_submit(tmp_path: Path) -> None:
    node = tmp_path / "python_node"
    node.write_text(NODE.replace("ended;", f"{tmp_path}/ended;").replace("> started", f"> {tmp_path}/started"))
    node.chmod(0o755)
    profile = CHECKOUT / "cluster" / "profiles" / "this_machine.toml"
    submit = subprocess.Popen([sys.executable, "-c", SUBMIT, str(profile), str(tmp_path)], cwd=CHECKOUT)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "started").exists() and time.monotonic() < deadline:
            assert submit.poll() is None
            time.sleep(0.1)
        submit.send_signal(signal.SIGINT)
        assert submit.wait(timeout=30) == 130
        assert (tmp_path / "ended").read_text() == "ended in order\n"
    finally:
        submit.kill()
        if not (tmp_path / "ended").exists():
            os.kill(int((tmp_path / "started").read_text()), signal.SIGKILL)
