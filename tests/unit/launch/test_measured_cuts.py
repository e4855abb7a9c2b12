"""Adaptive prefixes: what is sampled for a search, that it resumes, and what comes of the measured accuracies."""

from collections.abc import Callable, Sequence

import numpy as np

from minpro_megatron.evaluation.samples import SampledGroup, SampledResponse
from minpro_megatron.launch.measured_cuts import CUTS, MeasuredCuts
from minpro_megatron.prompt_sets.cut_search import Band
from minpro_megatron.prompt_sets.prefixes import Cuts, Trace
from minpro_megatron.prompts.prompts import TokenizedPrompt
from minpro_megatron.records import Prompt
from minpro_megatron.roles.evaluate import Task

SAMPLES = 8
QUESTION = np.asarray([7, 8, 9], np.int32)


class Characters:
    """A token is a character; an "x" at the end of a text is another token than elsewhere."""

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.asarray([*map(ord, text[:-1]), ord(text[-1]) + 1000 * (text[-1] == "x")]) for text in texts]

    def text(self, token_ids: np.ndarray) -> str:
        return "".join(chr(number) for number in token_ids.tolist())


def cuts_of(traces: dict[str, str], *bands: Band, max_prompt_tokens: int = 100) -> MeasuredCuts:
    prompts = [Prompt(id=name, source="s", text="?", answer="") for name in ("a", "b", "c")]
    return MeasuredCuts(
        model="base",
        bands=bands,
        samples=SAMPLES,
        right_reward=1.0,
        max_prompt_tokens=max_prompt_tokens,
        cuts=Cuts(count=3, shortest=0.1, longest=0.9, seed=0),
        prompts=[TokenizedPrompt(prompt, QUESTION) for prompt in prompts],
        traces={name: Trace(text) for name, text in traces.items()},
        tokenizer=Characters(),
    )


def answered(task: Task, num_right: int) -> SampledGroup:
    """The task's samples; the first `num_right` of its prompt's are right, and wrong ones may be ungraded."""
    numbers = range(task.first_sample, task.first_sample + len(task.group.sampling_seeds))
    responses = [SampledResponse("", 1, "stop", 1.0 if number < num_right else None) for number in numbers]
    return SampledGroup(task.benchmark, 0, task.group.prompt.id, task.first_sample, responses)


def search(cuts: MeasuredCuts, num_right: Callable[[str], int], at_once: int = 1000) -> list[SampledGroup]:
    """All samples of the search, `at_once` of whose groups are sampled before it is interrupted and planned again."""
    groups: list[SampledGroup] = []
    while tasks := cuts.next_tasks(groups, seed=0):
        groups += [answered(task, num_right(task.group.prompt.prefix)) for task in tasks[:at_once]]
    return groups


def test_each_trace_gets_a_prefix_whose_accuracy_is_in_the_band() -> None:
    # the accuracy grows with the prefix, faster for capitals
    def num_right(prefix: str) -> int:
        return min(SAMPLES, len(prefix) // (2 if prefix.isupper() else 5))

    bands = Band(0.25, 0.4), Band(0.7, 0.9)
    cuts = cuts_of({"a": "ABCDEFGHIJKLMNOPQRST", "b": "abcdefghijklmnopqrst"}, *bands)
    groups = search(cuts, num_right)
    found = cuts.found(groups)
    assert found.keys() == {"a", "b"}  # c has no trace
    assert {name: len(of_prompt) for name, of_prompt in found.items()} == {"a": 2, "b": 1}  # b never reaches 0.7
    for of_prompt in found.values():
        for one, band in zip(of_prompt, bands, strict=False):
            assert one.measured is not None
            assert band.low <= one.measured.pass_rate <= band.high
    for name, trace in (("a", "ABCDEFGHIJKLMNOPQRST"), ("b", "abcdefghijklmnopqrst")):
        for one in found[name]:
            assert trace.startswith(one.text)
            assert (len(one.text), one.trace_tokens) == (one.num_tokens, 20)
            assert one.measured is not None
            assert (one.measured.model, one.measured.samples) == ("base", SAMPLES)
            assert one.measured.right == num_right(one.text)


def test_an_interrupted_search_measures_the_same_places() -> None:
    def num_right(prefix: str) -> int:
        return min(SAMPLES, len(prefix) // 3)

    cuts = cuts_of({"a": "abcdefghijklmnopqrst", "c": "abcdefghij"}, Band(0.3, 0.5))
    whole, torn = search(cuts, num_right), search(cuts, num_right, at_once=1)
    assert {group.key for group in whole} == {group.key for group in torn}
    assert cuts.found(whole) == cuts.found(torn)
    assert all(group.benchmark == CUTS for group in whole)


def test_the_model_continues_the_tokens_of_the_trace() -> None:
    cuts = cuts_of({"a": "abcdefghij"}, Band(0.5, 0.5))
    tasks = cuts.next_tasks([], seed=0)
    assert sum(len(task.group.sampling_seeds) for task in tasks) == SAMPLES
    for task in tasks:
        prefix = task.group.prompt.prefix
        assert 1 <= len(prefix) <= 9
        assert "abcdefghij".startswith(prefix)
        expected = [*QUESTION.tolist(), *map(ord, prefix)]
        assert task.group.prompt_token_ids.tolist() == expected
    seeds = [seed for task in tasks for seed in task.group.sampling_seeds]
    assert len(set(seeds)) == SAMPLES


def test_long_prompts_and_places_inside_a_token_are_not_measured() -> None:
    for trace, limit in (("abcdefghijklmnopqrst", 8), ("abxxxxxxxxxxxxxxxxxc", 100)):
        cuts = cuts_of({"a": trace}, Band(1.0, 1.0), max_prompt_tokens=limit)
        lengths = {group.prompt_id.split("#")[1] for group in search(cuts, lambda prefix: 0)}
        longest = 5 if limit == 8 else 2
        assert lengths
        assert all(int(name.split("-")[1]) <= longest for name in lengths)
        assert cuts.found([]) == {"a": []}


def test_another_trace_is_measured_anew() -> None:
    first, second = (cuts_of({"a": text}, Band(0.2, 0.8)) for text in ("abcdefghij", "abcdefghik"))
    ids = [{task.group.prompt.id for task in cuts.next_tasks([], seed=0)} for cuts in (first, second)]
    assert not ids[0] & ids[1]
