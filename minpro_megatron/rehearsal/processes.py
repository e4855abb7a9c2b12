"""Rehearses one rank of each kind, each in its own process: a rehearsal changes torch for the rest of a process."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from minpro_megatron.errors import FAILED, SUCCEEDED, RunFailed
from minpro_megatron.rehearsal.kinds import representatives
from minpro_megatron.rehearsal.record import RankRehearsal
from minpro_megatron.rehearsal.subject import Rehearsed
from minpro_megatron.rehearsal.transformer_engine.files import find_folder


def rehearse_kinds(what: Rehearsed, overrides: Sequence[str]) -> Iterator[RankRehearsal]:
    """The rehearsals of the ranks that `representatives` names, as each ends; `what.rank` does not matter. Raises
    UserError for a recipe that cannot be rehearsed, RunFailed for a process that ended without a result."""
    what.checked()
    find_folder()
    with TemporaryDirectory() as folder:
        for rank in representatives(what.config.parallel):
            output = Path(folder, f"{rank}.json")
            command = [sys.executable, "-m", "minpro_megatron", "rehearse", what.recipe, *overrides]
            command += ["--rank", str(rank), "--imbalance", str(what.imbalance), "--json"]
            command += ["--layers", str(what.layers)] if what.layers else []
            with output.open("w") as file:
                status = subprocess.run(command, stdout=file, check=False).returncode
            if status not in (SUCCEEDED, FAILED) or not output.stat().st_size:
                raise RunFailed(f"rank {rank}: its rehearsal ended with exit status {status} and no result")
            yield RankRehearsal.from_json(json.loads(output.read_text())[0])
