"""Whatever a log, a status, an alarm or an error holds, the terminal gets text that it prints and does not act on."""

import io
import json
import time
from pathlib import Path

import pytest
from rich.console import Console

from minpro_megatron.errors import FAILED, UserError, report
from minpro_megatron.launch.launcher import closing_lines
from minpro_megatron.launch.supervisor import Failure, Outcome
from minpro_megatron.monitor.alarms import CHECKS
from minpro_megatron.monitor.logs import explanation
from minpro_megatron.monitor.progress import Progress
from minpro_megatron.monitor.rank_failures import RankFailure
from minpro_megatron.monitor.status import write_status
from minpro_megatron.terminal_text import visible
from tests.support.run_examples import example_config

SEQUENCES = {
    "clear the screen": "\x1b[2J\x1b[H",
    "colour": "\x1b[31mred\x1b[0m",
    "window title": "\x1b]0;title\x07",
    "clipboard": "\x1b]52;c;aGk=\x1b\\",
    "hyperlink": "\x1b]8;;http://evil\x1b\\text\x1b]8;;\x1b\\",
    "device control": '\x1bP$q"p\x1b\\',
    "reset": "\x1bc",
    "backspaces": "good\b\b\b\bevil",
    "bell and null": "\x07\x00",
    "C1 control sequence": "\x9b2J",
    "C1 operating system command": "\x9d0;title\x9c",
    "right to left override": "abc\u202edcba\u202c",
    "isolates": "\u2066a\u2069",
    "invisible": "a\u200bb\u2060c\ufeff",
    "line separator": "one\u2028two",
    "vertical tab and form feed": "a\x0bb\x0cc",
    "delete": "a\x7fb",
}


def is_harmless(text: str) -> bool:
    return all(character.isprintable() for line in text.split("\n") for character in line)


@pytest.fixture(params=SEQUENCES, ids=lambda name: name.replace(" ", "-"))
def sequence(request: pytest.FixtureRequest) -> str:
    assert not is_harmless(SEQUENCES[request.param])
    return SEQUENCES[request.param]


def test_each_is_spelt_out_and_nothing_is_lost(sequence: str) -> None:
    assert is_harmless(visible(sequence))
    plain = [character for character in sequence if character.isprintable()]
    assert [character for character in plain if character not in visible(sequence)] == []


@pytest.mark.parametrize("form", ["{}", "train: {}", "Traceback (most recent call last):\n  File x\nValueError: {}"])
def test_the_tail_of_a_log_is_harmless(tmp_path: Path, sequence: str, form: str) -> None:
    log = tmp_path / "train.log"
    log.write_text(f"first line\n{form.format(sequence)} end\n", encoding="utf-8")
    lines = explanation(log, role="train")
    assert any(line.endswith(" end") for line in lines)
    assert is_harmless("\n".join(lines))
    first = RankFailure(rank=1, host="h", time_ns=1, message="m", traceback=form.format(sequence).split("\n"))
    for rank in (None, first):
        failure = Failure("train", "failed with exit status 1", log, first_rank=rank)
        assert is_harmless("\n".join(closing_lines(Outcome(FAILED, [failure]))))


def test_an_error_is_harmless(sequence: str, capsys: pytest.CaptureFixture[str]) -> None:
    report(UserError(f"data.train_file: {sequence}"), "error")
    assert is_harmless(capsys.readouterr().err)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_live_display_is_harmless(tmp_path: Path, sequence: str, terminal: bool) -> None:
    config = example_config(tmp_path)
    config.run_dir.mkdir(parents=True)

    def shown(text: str) -> str:
        output = io.StringIO()
        with Progress(config, ["serve"], Console(file=output, force_terminal=terminal, width=200)) as progress:
            write_status(config.run_dir, "serve", f"starting {text}")
            alarm = {"step": 1, "name": next(iter(CHECKS)), "seen": text, "remedy": "r", "time": time.time() + 1}
            (config.run_dir / "alarms.jsonl").write_text(json.dumps(alarm) + "\n")
            progress._next_refresh = 0.0
            progress.tick()
        return output.getvalue()

    found, own = shown(sequence), shown("plain")
    assert "starting" in found
    assert set(filter(lambda c: not c.isprintable(), found)) <= set(own) | {"\n"}  # those of the display itself
    assert sequence not in found
