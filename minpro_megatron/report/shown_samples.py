"""Rollouts for a report: their fields, and the response's tokens colored by importance ratio."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from minpro_megatron.monitor.samples import MAX_SAMPLES, MAX_TOKENS
from minpro_megatron.report.pages import short

# |log ratio| from which a token is colored more strongly; exp of these are ratios of 1.02, 1.11, 1.65 and 4.5.
STRENGTHS = (0.02, 0.1, 0.5, 1.5)
_TOKENS, _RATIOS, _TEXT, _NUM_TOKENS, _GIVEN = "tokens", "ratios", "response", "num_tokens", "given"


class Token(NamedTuple):
    """A token's text, its CSS class, and the note shown for it."""

    text: str
    color: str  # "": no ratio, or one of almost 1; low1 .. low4 below 1, high1 .. high4 above; given: not sampled
    note: str


class Sample(NamedTuple):
    """One rollout: its fields, and the response as tokens, or as text if the tokens are not known."""

    fields: list[tuple[str, str]]
    response: str
    tokens: list[Token]
    num_left_out: int  # tokens at the response's end


def shown(samples: Sequence[Mapping[str, Any]]) -> list[Sample]:
    return [_shown(sample) for sample in samples[-MAX_SAMPLES:]]


def _shown(sample: Mapping[str, Any]) -> Sample:
    others = {name: value for name, value in sample.items() if name not in (_TOKENS, _RATIOS, _TEXT, _GIVEN)}
    fields = [(short(name, 200), short(value)) for name, value in others.items()]
    tokens, ratios = sample.get(_TOKENS), sample.get(_RATIOS)
    if not isinstance(tokens, list) or not isinstance(ratios, list) or len(tokens) != len(ratios):
        return Sample(fields, short(sample.get(_TEXT, "")), [], 0)
    given = sample.get(_GIVEN)
    given = given if isinstance(given, list) and len(given) == len(tokens) else [False] * len(tokens)
    colored = [
        _given_token(text) if is_given else _token(text, ratio)
        for text, ratio, is_given in zip(tokens[:MAX_TOKENS], ratios, given, strict=False)
    ]
    total = sample.get(_NUM_TOKENS)
    return Sample(fields, "", colored, max((total if isinstance(total, int) else len(tokens)) - len(colored), 0))


def _given_token(text: object) -> Token:
    return Token(_visible(text), "given", "given by the environment")


def _visible(text: object) -> str:
    return short(text, 200).replace("\n", "↵\n") or "∎"  # the stop token has no text


def _token(text: object, ratio: object) -> Token:
    shown = _visible(text)
    if not isinstance(ratio, int | float) or not math.isfinite(ratio) or ratio <= 0:
        return Token(shown, "", "no ratio")
    return Token(shown, color_of(ratio), f"ratio {ratio:.4g}")


def color_of(ratio: float) -> str:
    """The class of a token with this importance ratio, which is above 0."""
    distance = abs(math.log(ratio))
    strength = sum(distance >= least for least in STRENGTHS)
    return f"{'low' if ratio < 1 else 'high'}{strength}" if strength else ""
