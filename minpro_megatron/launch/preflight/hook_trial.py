"""Calls the hooks of a run on small inputs: `python -m minpro_megatron.launch.preflight.hook_trial`.

Reads the settings of a run as JSON from standard input and writes a JSON list with one line per problem. It is a
process of its own because a user's module may do anything when it is imported. Rewards have a check of their own.
"""

import json
import sys
import traceback
from collections.abc import Callable, Iterator

import numpy as np

from minpro_megatron.collector.group_filter import GroupFilter
from minpro_megatron.config.objective import ImportedObjectiveConfig
from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import ProjectError
from minpro_megatron.hooks.hook import Hook, is_import_path
from minpro_megatron.objective.advantages import group_advantages
from minpro_megatron.pipe_messages import output_for_messages
from minpro_megatron.records import CollectedGroup, IssuedGroup, Prompt, Response

REWARDS = [1.0, 0.0, 0.0, 0.5]
LENGTHS = [3, 1, 2, 3]


def problems(config: RunConfig) -> Iterator[str]:
    """One line for each hook that cannot be loaded, raises an error or returns what its rule forbids."""
    trials: dict[Hook, Callable[[], object]] = {
        Hook("objective.name", config.objective.name): lambda: _try_objective(config),
        Hook("loss.advantage", config.loss.advantage): lambda: group_advantages(
            REWARDS, config.loss.advantage, lengths=LENGTHS
        ),
        Hook("data.filter", config.data.filter): lambda: GroupFilter(config).keeps(_group()),
    }
    for hook, trial in trials.items():
        if not is_import_path(hook.path):
            continue
        try:
            trial()
        except ProjectError as error:
            yield str(error)
        except Exception as error:
            yield f"{hook}: {_described(error)}; correct the function"


def _described(error: Exception) -> str:
    """The error, and the line of the user's code that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({last.filename}, line {last.lineno})"


def _try_objective(config: RunConfig) -> None:
    from minpro_megatron.objective.imported import try_objective  # with torch, seconds

    assert isinstance(config.objective, ImportedObjectiveConfig)
    try_objective(config.objective)


def _group() -> CollectedGroup:
    prompt = Prompt(id="trial", source="trial", text="1+1=", answer="2")
    issued = IssuedGroup(
        group_id=0, batch_index=0, policy_version=0, prompt=prompt, prompt_token_ids=np.ones(2, np.int32),
        sampling_seeds=[0] * len(REWARDS),
    )  # fmt: skip
    responses = [
        Response(
            token_ids=np.ones(length, np.int32), rollout_log_probs=np.zeros(length, np.float32),
            policy_versions=np.zeros(length, np.int32), finish_reason="stop", reward=reward,
        )
        for reward, length in zip(REWARDS, LENGTHS, strict=True)
    ]  # fmt: skip
    return CollectedGroup(issued=issued, responses=responses)


def main() -> None:
    sink = output_for_messages()
    found = list(problems(RunConfig.from_json(sys.stdin.read())))
    sink.write(json.dumps(found).encode())


if __name__ == "__main__":
    main()
