"""`minpro status` of a run on this machine."""

import os
import time
from datetime import datetime
from pathlib import Path

from minpro_megatron.cluster.local_job import local_state
from minpro_megatron.cluster.records import JobRecord
from minpro_megatron.cluster.shell import shell_of
from minpro_megatron.cluster.status import status_lines
from minpro_megatron.monitor.status import write_status


def _logged(seconds: float, text: str) -> str:
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S},123 train INFO {text}\n"


def test_a_resumed_run_shows_what_it_waits_for_and_no_line_of_an_earlier_start(tmp_path: Path) -> None:
    now = time.time()
    record = JobRecord(
        name="first", job_id="local-1", run_dir=str(tmp_path), log_folder="", submitted_at=now, process_id=os.getpid()
    )
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "train.log"
    log.write_text(_logged(now - 3600, "global step 7: reward 0.5") + "a warning of the new start without a time\n")

    def shown() -> list[str]:
        _, *lines = status_lines(record, local_state(record), shell_of(None))
        return lines

    assert shown() == ["  train: starting"]
    write_status(tmp_path, "train", "loading the checkpoint")
    assert shown() == ["  train: loading the checkpoint, for 0 s"]
    write_status(tmp_path, "train", "training")
    with log.open("a") as more:
        more.write(_logged(now + 1, "global step 8: reward 0.6"))
    assert shown() == ["  train: training, for 0 s", "  " + _logged(now + 1, "global step 8: reward 0.6").rstrip()]
