"""Every command that README and documentation print is one that exists, with arguments that it accepts."""

import importlib.util
import shlex

import pytest

from docs.generator.commands import parser_of
from minpro_megatron.launch.recipe import apply_overrides, load_recipe
from tests.support.documents import ROOT, pages, shell_commands

COMMANDS = sorted({command for page in pages() for command in shell_commands(page)})
OWN = [command for command in COMMANDS if shlex.split(command)[0] == "minpro"]
OTHERS = [command for command in COMMANDS if command not in OWN]


def check_own(command: str) -> None:
    """Raises SystemExit or UserError if the command's parser or its recipe refuses the arguments."""
    _, name, *arguments = shlex.split(command)
    parser, method = parser_of(name)
    if arguments == ["--help"]:
        return
    options = getattr(parser, method)(arguments)
    if hasattr(options, "recipe"):
        apply_overrides(load_recipe(options.recipe), options.overrides)


@pytest.mark.parametrize("command", OWN)
def test_its_arguments_are_accepted(command: str) -> None:
    check_own(command)


@pytest.mark.parametrize(
    "command",
    [
        "minpro launch recipes.demo:tiny_moe batch.num_promts=4",
        "minpro launch recipes.demo:tiny",
        "minpro convert to-megatron --hf DIR",
        "minpro submit recipes.demo:tiny_moe name=first",
    ],
)
def test_a_wrong_command_is_noticed(command: str) -> None:
    with pytest.raises((SystemExit, ValueError)):
        check_own(command)


def test_the_documentation_prints_most_commands() -> None:
    printed = {shlex.split(command)[1] for command in OWN}
    assert {"launch", "check", "recipes", "settings", "plan", "convert", "prepare", "grade"} <= printed
    assert {"eval", "export", "show", "replay", "report", "compare", "submit", "status", "logs", "cancel"} <= printed


@pytest.mark.parametrize("command", OTHERS)
def test_what_else_it_runs_exists(command: str) -> None:
    program, *arguments = shlex.split(command)
    assert program in ("make", "cp", "python", "source", "tensorboard"), command
    if program == "cp":
        assert (ROOT / arguments[0]).exists()
    elif program == "python" and arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]) is not None
    elif program == "python":
        assert (ROOT / arguments[0]).is_file()
