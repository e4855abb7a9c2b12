"""Finds the rank of a role that failed first: each failing rank writes a file, and the role's parent reads them.

The failure of one rank makes the other ranks fail too, so all logs end with errors. The cause is the earliest error
that does not merely report the end of another process."""

import os
import socket
import time
import traceback
from contextlib import suppress
from pathlib import Path

import msgspec

from minpro_megatron.errors import FAILED, ProjectError
from minpro_megatron.files.replacement import replace_file_in
from minpro_megatron.monitor.logs import is_consequence

# Environment variable of a role: the folder for its ranks' files, logs/failures/<log>. The folder logs must exist.
FOLDER_VARIABLE = "MINPRO_RANK_FAILURES"


class RankFailure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a rank failed; `time_ns` is Unix time. Unexpected errors have a traceback, the project's own errors do
    not."""

    rank: int
    host: str
    time_ns: int
    message: str
    traceback: list[str] = []
    exit_status: int = FAILED  # WRONG_INPUT: a restart would fail as well until the input is corrected


def write_rank_failure(error: BaseException, rank: int) -> None:
    """Writes the failure of this rank, if its parent has set FOLDER_VARIABLE."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return
    is_own = isinstance(error, ProjectError)
    lines = "".join(traceback.format_exception(error)).rstrip().splitlines()
    failure = RankFailure(
        rank=rank,
        host=socket.gethostname(),
        time_ns=time.time_ns(),
        message=str(error) if is_own else f"{type(error).__name__}: {error}",
        traceback=[] if is_own else lines,
        exit_status=error.exit_status if isinstance(error, ProjectError) else FAILED,
    )
    with suppress(FileNotFoundError):  # the run folder may be gone, which must not hide the rank's own error
        logs, where = Path(folder).parents[1], "/".join(Path(folder).parts[-2:])
        replace_file_in(logs, f"{where}/rank-{rank}.json", msgspec.json.encode(failure).decode())


def first_rank_failure(folder: Path) -> RankFailure | None:
    """The earliest failure that is not a consequence of another one; None if there is none."""
    found = []
    for path in folder.glob("rank-*.json"):
        try:
            found.append(msgspec.json.decode(path.read_bytes(), type=RankFailure))
        except (OSError, msgspec.DecodeError):
            continue  # a damaged file must not prevent the report of another failure
    causes = [failure for failure in found if not is_consequence(failure.message)]
    return min(causes, key=lambda failure: failure.time_ns, default=None)
