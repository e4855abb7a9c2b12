"""Checks that the trainer's ranks reach each other: one sum over all ranks, with a time limit.

torchrun ... -m minpro_megatron.parallel.all_reduce_check cpu|cuda LIMIT_S
"""

import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist


def main() -> int:
    """Exit status 0 if this rank received the right sum, else 1 with a line on stderr."""
    device, limit_s = sys.argv[1], float(sys.argv[2])
    rank, began = int(os.environ["RANK"]), time.monotonic()
    try:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=limit_s))
        # large enough to use the same algorithm as real gradients, not that of small messages
        ones = torch.ones(2**20, device=device)
        dist.all_reduce(ones)
        total = ones.max().item()
        dist.destroy_process_group()
    except RuntimeError as error:
        print(f"rank {rank}: {' '.join(str(error).split())[:500]}", file=sys.stderr)
        return 1
    if total != int(os.environ["WORLD_SIZE"]):
        print(f"rank {rank}: the sum of {os.environ['WORLD_SIZE']} ones is {total}", file=sys.stderr)
        return 1
    if rank == 0:
        print(f"all-reduce over {os.environ['WORLD_SIZE']} ranks in {time.monotonic() - began:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
