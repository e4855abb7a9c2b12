"""Which samples of an evaluation are still to be taken, and with which seeds."""

import numpy as np

from minpro_megatron.prompts.prompts import TokenizedPrompt
from minpro_megatron.records import Prompt
from minpro_megatron.roles.evaluate import Key, Task, plan


def prompt(prompt_id: str) -> TokenizedPrompt:
    return TokenizedPrompt(Prompt(id=prompt_id, source="s", text="1+1=", answer="2"), np.asarray([1], dtype=np.int32))


def places(tasks: list[Task]) -> list[tuple[Key, int]]:
    return [(task.key, len(task.group.sampling_seeds)) for task in tasks]


PROMPTS = {"a": [prompt("x"), prompt("y")], "b": [prompt("x")]}


def test_samples_are_asked_for_two_at_a_time() -> None:
    assert places(plan(PROMPTS, {"a": 3, "b": 2}, seed=0)) == [
        (("a", "x", 0), 2),
        (("a", "x", 2), 1),
        (("a", "y", 0), 2),
        (("a", "y", 2), 1),
        (("b", "x", 0), 2),
    ]


def test_what_is_done_is_left_out_and_the_rest_keeps_its_seeds() -> None:
    everything = {task.key: task.group.sampling_seeds for task in plan(PROMPTS, {"a": 4, "b": 2}, seed=0)}
    left = plan(PROMPTS, {"a": 4, "b": 2}, seed=0, done=[("a", "x", 0), ("b", "x", 0)])
    assert [task.key for task in left] == [("a", "x", 2), ("a", "y", 0), ("a", "y", 2)]
    assert all(everything[task.key] == task.group.sampling_seeds for task in left)


def test_every_sample_has_a_seed_of_its_own() -> None:
    seeds = [
        seed for run in (0, 1) for task in plan(PROMPTS, {"a": 4, "b": 4}, run) for seed in task.group.sampling_seeds
    ]
    assert len(set(seeds)) == len(seeds) == 24


def test_a_prompts_seeds_do_not_depend_on_the_others() -> None:
    alone = plan({"a": [prompt("y")]}, {"a": 2}, seed=0)
    assert alone[0].group.sampling_seeds == plan(PROMPTS, {"a": 2, "b": 2}, seed=0)[1].group.sampling_seeds
