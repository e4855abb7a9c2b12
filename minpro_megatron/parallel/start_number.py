"""The number of a start, on which the nodes of a job agree, where the job's scheduler does not number its starts.

    python -m minpro_megatron.parallel.start_number --index 1 --nodes 2 --head 10.0.0.1:29431

The node with index 0 chooses the number and the others read it from a store of torch that is open on this node until
all have read it. A node of an earlier start cannot be mistaken for one of this start, as it could be with files: it has
ended, and its store with it.
"""

import sys
import time
from datetime import timedelta

from torch.distributed import DistError, TCPStore  # type: ignore[reportPrivateImportUsage]

from minpro_megatron.command_line import Parser
from minpro_megatron.errors import TryAgainError, UserError, run_reporting

# Between the starts of two nodes: each may have to unpack a container image.
LIMIT_S = 600.0
_POLL_S = 0.1


def agree(index: int, num_nodes: int, host: str, port: int, limit_s: float = LIMIT_S) -> int:
    """The number of this start, the same on all nodes and larger than those of earlier starts. Returns after all nodes
    have read it. Raises TryAgainError if one of them does not within `limit_s`."""
    try:
        store = TCPStore(
            host, port, num_nodes, is_master=index == 0, timeout=timedelta(seconds=limit_s), wait_for_workers=False
        )
        if index == 0:
            store.set("number", str(time.time_ns()))
        number = int(store.get("number"))
        arrived = store.add("arrived", 1)
        deadline = time.monotonic() + limit_s
        while index == 0 and arrived < num_nodes:
            if time.monotonic() > deadline:
                raise TryAgainError(f"{arrived} of {num_nodes} nodes have started within {limit_s:.0f} s")
            time.sleep(_POLL_S)
            arrived = store.add("arrived", 0)
    except DistError as error:
        first_line = str(error).splitlines()[0]
        raise TryAgainError(f"node {index} cannot reach node 0 at {host}:{port}: {first_line}") from None
    return number


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m minpro_megatron.parallel.start_number", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--index", type=int, required=True, metavar="N", help="index of this node, from 0")
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="number of nodes")
    parser.add_argument("--head", required=True, metavar="HOST:PORT", help="address of the node with index 0")
    given = parser.parse_args(arguments)

    def run() -> int:
        host, _, port = given.head.rpartition(":")
        if not host or not port.isdecimal() or not 0 <= given.index < given.nodes:
            raise UserError(
                f"--head {given.head} --index {given.index} --nodes {given.nodes}: expected HOST:PORT and an index "
                "below the number of nodes"
            )
        print(agree(given.index, given.nodes, host, int(port)))
        return 0

    return run_reporting(run)


if __name__ == "__main__":
    sys.exit(main())
