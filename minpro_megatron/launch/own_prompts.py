"""What the commands have in common that sample the prompts of a run's own file: `pass-rates` and `prefixes`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import UserError
from minpro_megatron.launch.evaluation import check_before_sampling
from minpro_megatron.launch.evaluation_options import EvaluationOptions, run_config
from minpro_megatron.launch.evaluation_prompts import read_benchmarks
from minpro_megatron.launch.preflight.reward_check import grader_problems
from minpro_megatron.prompts.prompts import TokenizedPrompt

PROMPTS = "prompts"  # the name in the file of samples


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


@dataclass(frozen=True)
class OwnPrompts:
    """The prompts of the file `--prompts` as tokens, and the settings with which they are sampled."""

    asked: EvaluationOptions
    config: RunConfig
    tokenized: Sequence[TokenizedPrompt]

    @property
    def by_name(self) -> dict[str, Sequence[TokenizedPrompt]]:
        return {PROMPTS: self.tokenized}


def read_own_prompts(
    model: str, path: Path, samples: Mapping[str, int], folder: Path, settings: Mapping[str, Any]
) -> OwnPrompts:
    """Raises UserError for what would otherwise fail only after the servers have started, graders included."""
    asked = EvaluationOptions(
        model=model,
        benchmarks=[PROMPTS],
        benchmark_files={PROMPTS: path},
        samples=samples,
        output=folder,
        settings=settings,
    )
    config = run_config(asked)
    check_before_sampling(config)
    tokenized = read_benchmarks(asked, config)[PROMPTS]
    rows = {"--prompts": [one.prompt for one in tokenized]}
    if found := list(grader_problems(config.reward, rows, "--reward")):
        raise UserError(found)
    return OwnPrompts(asked, config, tokenized)
