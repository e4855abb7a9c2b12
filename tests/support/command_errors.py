"""What a command says of input that it refuses."""

import pytest

from minpro_megatron.__main__ import main


def errors_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The lines on standard error of a command that must end with status 2 and print nothing else."""
    try:
        status = main(list(arguments))
    except SystemExit as end:
        status = end.code
    printed = capsys.readouterr()
    assert status == 2
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert all(line.startswith("error: ") for line in lines), lines
    return [line.removeprefix("error: ") for line in lines]
