"""The command line. A command's module is imported when the command is used, so that each imports only what it needs:
none imports torch before it has parsed its arguments."""

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from minpro_megatron.command_line import PROGRAM, did_you_mean
from minpro_megatron.errors import INTERRUPTED, UserError, report
from minpro_megatron.missing_packages import missing_package

CHECKOUT = Path(__file__).resolve().parents[1]
_AS_MODULE = "python -m minpro_megatron"


class Command(NamedTuple):
    """Where a command is: the module and its function, which gets the arguments and the name for its messages."""

    module: str
    summary: str
    function: str = "main"


def _here(name: str, summary: str) -> Command:
    return Command(f"minpro_megatron.commands.{name}", summary)


def _role(function: str, summary: str) -> Command:
    return Command("minpro_megatron.commands.roles", summary, function)


GROUPS: dict[str, dict[str, Command]] = {
    "a run on this machine": {
        "launch": _here("launch", "run a recipe with all roles on this machine"),
        "check": _here("check", "check a recipe as launch does, without starting anything"),
        "recipes": _here("recipes", "list the recipes"),
        "settings": _here("settings", "list the settings with their values, defaults and descriptions"),
        "plan": _here("plan", "predict whether a run fits on a cluster, and how long a step takes"),
        "gpu-check": _here("gpu_check", "check on one GPU, in a few minutes, that kernels, memory and copies work"),
        "rehearse": _here("rehearse", "run a trainer rank at full size on tensors without content, without a GPU"),
    },
    "models": {
        "convert": _here("convert", "convert between Hugging Face and Megatron checkpoints"),
        "compare-logits": _here("compare_logits", "compare a Megatron checkpoint on a mesh with its original"),
        "tiny-model": _here("tiny_model", "make the tiny model of the demo"),
    },
    "prompts": {
        "prepare": _here("prepare", "make prompt files from data sets"),
        "pass-rates": _here("pass_rates", "measure how often a model solves each prompt of a file"),
        "prefixes": _here("prefixes", "make the prompts of PrefixRL, with prefixes of correct responses"),
        "grade": _here("grade", "grade responses from a file as a run does"),
    },
    "results of a run": {
        "eval": _here("eval", "sample benchmarks and report accuracy, pass@k and maj@k"),
        "export": _here("export", "write a policy version of a run as a Hugging Face folder"),
        "show": _here("show", "show the rollouts of a run, down to every token"),
        "replay": _here("replay", "train on stored rollouts again, without servers"),
        "report": _here("report", "write a run's report.html again"),
        "compare": _here("compare", "compare runs on one page"),
    },
    "a run on a cluster": {
        "submit": Command("minpro_megatron.cluster.submit", "submit a recipe to a cluster as one job"),
        "status": Command("minpro_megatron.cluster.status", "show the state of submitted jobs"),
        "logs": Command("minpro_megatron.cluster.logs", "show the log of a submitted job"),
        "cancel": Command("minpro_megatron.cluster.cancel", "end a submitted job"),
    },
}
# What the launcher and a cluster's job start.
ROLES = {
    "serve": _role("serve", "start and watch the SGLang rollout servers"),
    "collect": _role("collect", "issue prompts, collect and reward rollouts, feed the trainer"),
    "train": _role("train", "one rank of the trainer (started by torchrun)"),
    "timer": _role("timer", "replace the trainer and only measure the servers (debug.trainer=timer)"),
    "node": _here("node", "run one node's share of a run on several nodes (started by a cluster's job)"),
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}


def run_command(name: str, arguments: Sequence[str], prog: str) -> int:
    """Runs the command `name` and returns its exit status. `prog` is how it was called, for its messages."""
    command = {**COMMANDS, **ROLES}[name]
    _use_this_code()
    try:
        function = getattr(importlib.import_module(command.module), command.function)
        status = function(list(arguments), prog)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        if (problem := missing_package(error)) is None:
            raise
        return report(UserError(problem), "error")
    except BrokenPipeError:  # piped into head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python reports it once more at its end
        return INTERRUPTED


def _use_this_code() -> None:
    """Modules of the current folder can be imported, such as recipes and rewards. The processes that a command starts
    run the code of the same checkout, whichever one the environment was made for."""
    if os.getcwd() not in map(os.path.abspath, sys.path):
        sys.path.insert(0, os.getcwd())
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if (CHECKOUT / "pyproject.toml").is_file() and str(CHECKOUT) not in given:
        os.environ["PYTHONPATH"] = os.pathsep.join([*filter(None, given), str(CHECKOUT)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that `arguments` name (by default those of this process); returns its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    program = PROGRAM if Path(sys.argv[0]).name == PROGRAM else _AS_MODULE
    if program == PROGRAM and _is_another_checkout(folder := Path.cwd()):
        _run_code_in(folder, given)
    if not given:
        return _refuse(f"a command is missing; see {program} --help")
    name, *rest = given
    if name in ("-h", "--help", "help"):
        print(_help(program))
        return 0
    if name == "--version":
        from minpro_megatron import __version__

        print(f"minpro-megatron {__version__}")
        return 0
    if name not in COMMANDS and name not in ROLES:
        return _refuse(f"there is no command {name!r}{did_you_mean(name, COMMANDS)}; see {program} --help")
    return run_command(name, rest, f"{program} {name}")


def _is_another_checkout(folder: Path) -> bool:
    """Whether the folder has this project's code, but not the code that runs."""
    code = folder / "minpro_megatron" / "__main__.py"
    return code.is_file() and not code.samefile(__file__)


def _run_code_in(checkout: Path, arguments: list[str]) -> NoReturn:
    """Replaces this process by the same command with the code of `checkout`. Otherwise a command called there would
    read the recipes of that checkout, and the models, data and code of the one that the environment was made for."""
    print(
        f"note: running the code in {checkout}; this environment was made for {CHECKOUT}", file=sys.stderr, flush=True
    )
    path = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "minpro_megatron", *arguments]
    os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": path})


def _refuse(problem: str) -> int:
    print(f"error: {problem}", file=sys.stderr)
    return 2


def _help(program: str) -> str:
    lines = [
        f"usage: {program} COMMAND [argument ...]",
        "",
        "RL post-training under off-policy drift: MinPRO on Megatron-Core, with SGLang rollouts.",
    ]
    for title, commands in GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name:<15} {command.summary}" for name, command in commands.items())]
    lines += ["", f"{program} COMMAND --help explains a command; {program} --version shows the version."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
