"""Messages between collect and serve about GPUs that trainer and servers share, in files of `run_dir/endpoints`.

`turn-start-<incarnation>.json`, from collect to serve: which servers have released their memory for the trainer. No
other server may have a process, because it would use memory; null: the servers' turn, in which serve starts and
restarts them. `obeyed-<index>-start-<incarnation>.json`, from serve to collect: the last such message that holds for a
server.
"""

from collections.abc import Collection
from pathlib import Path

import msgspec

from minpro_megatron.files.replacement import replace_file_in
from minpro_megatron.records import ServerAddress


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """`released`: (index, start) of the servers that have released their memory; None: it is the servers' turn.
    `is_last`: the servers have no more work in this run."""

    number: int
    released: list[tuple[int, int]] | None
    is_last: bool = False

    def allows(self, index: int, start: int) -> bool:
        """Whether this start of a server may have a process."""
        return self.released is None or (index, start) in self.released


def _turn_name(incarnation: int) -> str:
    return f"endpoints/turn-start-{incarnation}.json"


def _obeyed_name(index: int, incarnation: int) -> str:
    return f"endpoints/obeyed-{index}-start-{incarnation}.json"


def write_turn(
    run_dir: Path, number: int, released: Collection[ServerAddress] | None, incarnation: int, is_last: bool = False
) -> None:
    """Raises OSError."""
    kept = None if released is None else [(address.index, address.start) for address in released]
    text = msgspec.json.encode(Turn(number=number, released=kept, is_last=is_last)).decode()
    replace_file_in(Path(run_dir), _turn_name(incarnation), text + "\n")


def read_turn(run_dir: Path, incarnation: int) -> Turn:
    """The current turn: that of the servers before the first message. Raises OSError."""
    try:
        return msgspec.json.decode((Path(run_dir) / _turn_name(incarnation)).read_bytes(), type=Turn)
    except FileNotFoundError:
        return Turn(number=0, released=None)


def confirm_turn(run_dir: Path, index: int, number: int, incarnation: int) -> None:
    """States that turn `number` holds for the server. Raises OSError."""
    replace_file_in(Path(run_dir), _obeyed_name(index, incarnation), f"{number}\n")


def last_confirmed(run_dir: Path, index: int, incarnation: int) -> int:
    """The number of the last turn that holds for the server. Raises OSError."""
    try:
        return int((Path(run_dir) / _obeyed_name(index, incarnation)).read_text(encoding="ascii"))
    except FileNotFoundError:
        return 0
