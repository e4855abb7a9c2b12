"""What the commands have in common that sample the prompts of a run's own file: `pass-rates` and `prefixes`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from minpro_megatron.errors import UserError


def check_written_files(
    read: Mapping[str, Sequence[Path]],
    written: Mapping[str, Path | None],
    rewritten: Sequence[tuple[str, str]] = (),
) -> None:
    """Raises UserError if a file that is written is one that is read, or another one that is written: hours later the
    last one written would be all that is left. By the names in messages; `rewritten`: the pairs (written, read) that
    may be one file. Links count as the files that they lead to.
    """
    owners = {path.resolve(): option for option, paths in read.items() for path in paths}
    problems = []
    for option, path in written.items():
        if path is None:
            continue
        other = owners.setdefault(path.resolve(), option)
        if other == option or (option, other) in rewritten:
            continue
        problems.append(f"{option} {path} is the file of {other}, which it would replace; give it a file of its own")
    if problems:
        raise UserError(problems)
