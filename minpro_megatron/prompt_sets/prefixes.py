"""The prompts of PrefixRL (arXiv:2601.18795): where correct responses are cut, and the rows that the cuts make."""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from minpro_megatron.config.seeds import derive_seed
from minpro_megatron.records import Prompt


class Texts(Protocol):
    """The methods of TextTokenizer that cutting needs."""

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def text(self, token_ids: np.ndarray) -> str: ...


@dataclass(frozen=True)
class Cuts:
    """How traces are cut: `count` cuts, at fractions of their tokens between the two limits."""

    count: int
    shortest: float
    longest: float
    seed: int


def cut_places(num_tokens: int, cuts: Cuts) -> range:
    """The numbers of tokens at which a trace of `num_tokens` may be cut; at least one token remains on both sides."""
    # rounded: 0.7 * 10 tokens is more than 7 in floating point
    first, last = round(cuts.shortest * num_tokens, 9), round(cuts.longest * num_tokens, 9)
    return range(max(1, math.ceil(first)), math.floor(last) + 1)


def prefixes_of(trace: str, prompt_id: str, tokenizer: Texts, cuts: Cuts) -> list[str]:
    """Up to `cuts.count` different prefixes of `trace`, shortest first. They depend only on the seed and the id.

    All positions are equally likely, except those where the prefix's text would be tokenized differently from the
    beginning of the trace (inside a character of several tokens, for example): the policy must see what was sampled.
    """
    (token_ids,) = tokenizer.encode_all([trace])
    places = list(cut_places(len(token_ids), cuts))
    random.Random(derive_seed(cuts.seed, f"prefixes/{prompt_id}")).shuffle(places)
    kept: dict[int, str] = {}
    for place in places:
        if len(kept) == cuts.count:
            break
        text = tokenizer.text(token_ids[:place])
        (again,) = tokenizer.encode_all([text])
        if np.array_equal(again, token_ids[:place]):
            kept[place] = text
    return [kept[place] for place in sorted(kept)]


def training_rows(
    prompts: Iterable[Prompt], traces: dict[str, str], tokenizer: Texts, cuts: Cuts
) -> list[dict[str, Any]]:
    """For each prompt with a trace its plain row, then one row per prefix, with ids of their own."""
    rows = []
    for prompt in prompts:
        if prompt.id not in traces:
            continue
        plain = {"id": prompt.id, "source": prompt.source, "prompt": prompt.text, "answer": prompt.answer}
        rows.append(plain if prompt.pass_rate is None else plain | {"pass_rate": prompt.pass_rate})
        for number, prefix in enumerate(prefixes_of(traces[prompt.id], prompt.id, tokenizer, cuts)):
            rows.append(plain | {"id": f"{prompt.id}#prefix-{number}", "prefix": prefix})
    return rows
