"""A member of the group of trainer and servers that joins and then does nothing.

    python -m minpro_megatron.gpu_checks.silent_member '{"master_address": ...}' cuda LIMIT_S

Prints "joined" once it has joined, and ends when its standard input is closed.
"""

import json
import sys

from minpro_megatron.parallel.device import select_device
from minpro_megatron.publishing.update_group import join_update_group


def main() -> None:
    if sys.argv[2] == "cuda":
        select_device("cuda")
    group = join_update_group(**json.loads(sys.argv[1]), rank=1, timeout_s=float(sys.argv[3]))
    print("joined", group.size(), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
