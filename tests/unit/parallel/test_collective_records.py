"""What a hanging rank leaves of its collectives, for torch's own reader."""

import pickle
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from minpro_megatron.parallel.collective_records import write_collective_records


def test_the_last_collectives_are_written_without_a_setting(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        dist.all_reduce(torch.ones(3, 5))
        files = {path.name: pickle.loads(path.read_bytes()) for path in write_collective_records(tmp_path, 3, 7)}
        later = write_collective_records(tmp_path, 4, 0)
    finally:
        dist.destroy_process_group()
    last = files["gloo-rank-7"]["entries"][-1]
    assert (last["profiling_name"], last["input_sizes"]) == ("gloo:all_reduce", [[3, 5]])
    assert "frames" not in last, "for them torch imports its compiler, for which a hanging process has no time"
    # with NCCL untested: this build of torch has its recorder, which has seen no group
    assert files.get("nccl-rank-7", {"entries": []})["entries"] == []
    assert sorted(path.name for path in (tmp_path / "collectives" / "3").iterdir()) == sorted(files)
    # an earlier start, perhaps of more ranks, has left files that torch's reader must not find beside these
    assert sorted((tmp_path / "collectives" / "4").iterdir()) == sorted(later)
