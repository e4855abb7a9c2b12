"""Which of a role's ranks failed first: each rank that fails writes a file, and whoever started the role reads them.

A rank that fails takes the others along, and their logs then all end with errors. Of these the earliest one that does
not speak of another process's end is the cause.
"""

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

# Environment variable of a role: the folder for its ranks' files, logs/failures/<log>. Of it the logs must be there.
FOLDER_VARIABLE = "MINPRO_RANK_FAILURES"


class RankFailure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a rank failed; `time_ns`: Unix time. An unexpected error has a traceback, the project's own have none."""

    rank: int
    host: str
    time_ns: int
    message: str
    traceback: list[str] = []
    exit_status: int = FAILED  # WRONG_INPUT: another start would fail as well until a person has acted


def write_rank_failure(error: BaseException, rank: int) -> None:
    """States that this rank has failed, if whoever started it asks for that."""
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
    """The earliest failure that is no consequence of another one; None if no rank wrote such."""
    found = []
    for path in folder.glob("rank-*.json"):
        try:
            found.append(msgspec.json.decode(path.read_bytes(), type=RankFailure))
        except (OSError, msgspec.DecodeError):
            continue  # the report of one failure must not fail over another one's file
    causes = [failure for failure in found if not is_consequence(failure.message)]
    return min(causes, key=lambda failure: failure.time_ns, default=None)
