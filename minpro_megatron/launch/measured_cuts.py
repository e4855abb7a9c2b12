"""Cuts of traces by the accuracy that the model has after them: which to measure next, and which are in a band."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import msgspec
import numpy as np

from minpro_megatron.config.reward import is_right
from minpro_megatron.evaluation.samples import SampledGroup
from minpro_megatron.prompt_sets.cut_search import Accuracy, Band, Places, found_places, next_places
from minpro_megatron.prompt_sets.pass_rates import Measured
from minpro_megatron.prompt_sets.prefixes import Cuts, Prefix, Texts, Trace, cut_places, text_before
from minpro_megatron.prompts.prompts import TokenizedPrompt
from minpro_megatron.roles.evaluate import Task, plan

CUTS = "cuts"  # the name in the file of samples


@dataclass(frozen=True, kw_only=True)
class MeasuredCuts:
    """The searches for cuts of all traces. Each method is a function of the samples so far.

    `cuts` bounds the places; a prompt with its prefix has at most `max_prompt_tokens` tokens. A place is measured with
    `samples` responses.
    """

    model: str
    bands: Sequence[Band]
    samples: int
    right_reward: float
    max_prompt_tokens: int
    cuts: Cuts
    prompts: Sequence[TokenizedPrompt]
    traces: Mapping[str, Trace]
    tokenizer: Texts

    def next_tasks(self, groups: Sequence[SampledGroup], seed: int) -> list[Task]:
        """The samples that the searches need next; none if all have ended."""
        rates = self._rates(groups)
        wanted = []
        for prompt in self.prompts:
            if (trace := self.traces.get(prompt.prompt.id)) is not None:
                searched = _SearchedTrace(prompt, trace, self)
                places = next_places(searched.places, searched.accuracy(rates), self.bands)
                wanted += [searched.prompt_at(place) for place in places]
        return plan({CUTS: wanted}, {CUTS: self.samples}, seed, {group.key for group in groups})

    def found(self, groups: Sequence[SampledGroup]) -> dict[str, list[Prefix]]:
        """For each prompt with a trace the prefixes whose accuracies are in a band, shortest first."""
        rates = self._rates(groups)
        result = {}
        for prompt in self.prompts:
            if (trace := self.traces.get(prompt.prompt.id)) is not None:
                result[prompt.prompt.id] = _SearchedTrace(prompt, trace, self).found(rates)
        return result

    def _rates(self, groups: Sequence[SampledGroup]) -> dict[str, Measured]:
        """The completely measured cuts, by the id of their prompts."""
        rewards: dict[str, dict[int, float | None]] = defaultdict(dict)
        for group in groups:
            if group.benchmark == CUTS:
                numbered = enumerate((response.reward for response in group.responses), start=group.first_sample)
                rewards[group.prompt_id].update(numbered)
        wanted = range(self.samples)
        return {
            prompt_id: Measured(self.model, self.samples, sum(is_right(found[n], self.right_reward) for n in wanted))
            for prompt_id, found in rewards.items()
            if all(number in found for number in wanted)
        }


@dataclass(frozen=True)
class _SearchedTrace:
    """A prompt, its trace, and the places where the trace may be cut."""

    prompt: TokenizedPrompt
    trace: Trace
    search: MeasuredCuts

    @cached_property
    def token_ids(self) -> np.ndarray:
        return self.trace.ids(self.search.tokenizer)

    @cached_property
    def places(self) -> Places:
        longest = self.search.max_prompt_tokens - len(self.prompt.token_ids)
        candidates = [place for place in cut_places(len(self.token_ids), self.search.cuts) if place <= longest]
        return Places(candidates, lambda place: self._text_before(place) is not None)

    def accuracy(self, rates: Mapping[str, Measured]) -> Accuracy:
        def of_place(place: int) -> float | None:
            found = rates.get(self._id(place))
            return None if found is None else found.pass_rate

        return of_place

    def prompt_at(self, place: int) -> TokenizedPrompt:
        """The prompt with the prefix before `place`, which is a place to cut at."""
        prompt = msgspec.structs.replace(self.prompt.prompt, id=self._id(place), prefix=self._text_before(place) or "")
        return TokenizedPrompt(prompt, np.concatenate([self.prompt.token_ids, self.token_ids[:place]]))

    def found(self, rates: Mapping[str, Measured]) -> list[Prefix]:
        places = found_places(self.places, self.accuracy(rates), self.search.bands)
        size = len(self.token_ids)
        return [Prefix(self._text_before(place) or "", place, size, rates[self._id(place)]) for place in places]

    def _text_before(self, place: int) -> str | None:
        return text_before(self.token_ids, place, self.search.tokenizer)

    def _id(self, place: int) -> str:
        """The id of the prompt that is cut here; another trace of the same prompt has others."""
        return f"{self.prompt.prompt.id}#cut-{place}-of-{self._digest}"

    @cached_property
    def _digest(self) -> str:
        return blake2b(self.token_ids.astype("<i4").tobytes(), digest_size=6).hexdigest()
