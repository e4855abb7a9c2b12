"""The prompts of PrefixRL (arXiv:2601.18795): where correct responses are cut, and the rows that the cuts make."""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import numpy as np

from minpro_megatron.config.seeds import derive_seed
from minpro_megatron.prompt_sets.pass_rates import Measured
from minpro_megatron.records import Prompt

PREFIXED = "#prefix-"  # in the ids of prompts with a prefix, after the id of the plain prompt
SAMPLED = "sampled"  # the origin of the traces that the command itself samples


class Texts(Protocol):
    """The methods of TextTokenizer that cutting needs."""

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def text(self, token_ids: np.ndarray) -> str: ...


@dataclass(frozen=True)
class Trace:
    """A correct response to a prompt. `origin`: who wrote it. `token_ids`: those that were sampled, without a stop
    token, if they are of the tokenizer of the model that will be trained; None: the text's own."""

    text: str
    origin: str = SAMPLED
    token_ids: np.ndarray | None = None

    def ids(self, tokenizer: Texts) -> np.ndarray:
        return tokenizer.encode_all([self.text])[0] if self.token_ids is None else self.token_ids


@dataclass(frozen=True)
class Cuts:
    """How traces are cut: `count` cuts, at fractions of their tokens between the two limits."""

    count: int
    shortest: float
    longest: float
    seed: int


@dataclass(frozen=True)
class Prefix:
    """The first `num_tokens` tokens of a trace of `trace_tokens` tokens. `measured`: how often the problem was solved
    after it, if that is known."""

    text: str
    num_tokens: int
    trace_tokens: int
    measured: Measured | None = None


def cut_places(num_tokens: int, cuts: Cuts) -> range:
    """The numbers of tokens at which a trace of `num_tokens` may be cut; at least one token remains on both sides."""
    # rounded: 0.7 * 10 tokens is more than 7 in floating point
    first, last = round(cuts.shortest * num_tokens, 9), round(cuts.longest * num_tokens, 9)
    return range(max(1, math.ceil(first)), math.floor(last) + 1)


def text_before(token_ids: np.ndarray, place: int, tokenizer: Texts) -> str | None:
    """The text of the first `place` tokens; None if it would be tokenized differently (inside a character of several
    tokens, for example): the policy must see what was sampled."""
    text = tokenizer.text(token_ids[:place])
    (again,) = tokenizer.encode_all([text])
    return text if np.array_equal(again, token_ids[:place]) else None


def prefixes_of(trace: Trace, prompt_id: str, tokenizer: Texts, cuts: Cuts) -> list[Prefix]:
    """Up to `cuts.count` different prefixes of `trace`, shortest first. They depend only on the seed and the id.

    All places are equally likely, except those without a text of their own (`text_before`).
    """
    token_ids = trace.ids(tokenizer)
    places = list(cut_places(len(token_ids), cuts))
    random.Random(derive_seed(cuts.seed, f"prefixes/{prompt_id}")).shuffle(places)
    kept: dict[int, str] = {}
    for place in places:
        if len(kept) == cuts.count:
            break
        text = text_before(token_ids, place, tokenizer)
        if text is not None:
            kept[place] = text
    return [Prefix(kept[place], place, len(token_ids)) for place in sorted(kept)]


def training_rows(
    prompts: Iterable[Prompt], traces: Mapping[str, Trace], prefixes: Mapping[str, Sequence[Prefix]]
) -> list[dict[str, Any]]:
    """For each prompt with a trace its plain row, then one row per prefix, with ids of their own.

    A prefixed row has no pass rate but the measured one of its prefix: the plain prompt's is another.
    """
    rows = []
    for prompt in prompts:
        if prompt.id not in traces:
            continue
        plain = {"id": prompt.id, "source": prompt.source, "prompt": prompt.text, "answer": prompt.answer}
        plain |= {"system": prompt.system} if prompt.system else {}
        plain |= {} if prompt.metadata is None else {"metadata": prompt.metadata}
        rows.append(plain if prompt.pass_rate is None else plain | {"pass_rate": prompt.pass_rate})
        for number, prefix in enumerate(prefixes[prompt.id]):
            row = plain | {"id": f"{prompt.id}{PREFIXED}{number}", "prefix": prefix.text}
            if prefix.measured is not None:
                row |= {"pass_rate": prefix.measured.pass_rate, "measured": msgspec.to_builtins(prefix.measured)}
            origin = traces[prompt.id].origin
            rows.append(row | {"trace": {"from": origin, "tokens": prefix.trace_tokens, "given": prefix.num_tokens}})
    return rows
