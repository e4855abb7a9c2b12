"""Async and group rewards that do what the responses say."""

import asyncio
import os
import time

from minpro_megatron.rewards.forms import Grade, GroupToGrade

_calls: dict[str, int] = {}


def lengths(group: GroupToGrade) -> list[float]:
    """A group reward: the number of tokens of each response plus the row's bonus, 0.5 more for a cut response."""
    bonus = 0.0 if group.metadata is None else group.metadata["bonus"]
    return [len(one.token_ids) + bonus + 0.5 * (one.finish_reason == "length") for one in group.responses]


def hostile(group: GroupToGrade) -> list[float]:
    return [_obey(one.text) for one in group.responses]


def _obey(text: str) -> float:
    if text == "raise":
        raise RuntimeError("no grade")
    if text == "die":
        os._exit(9)
    if text == "spin":
        return float(10**10**10)
    return 1.0


async def patient(group: GroupToGrade) -> list[float | Grade]:
    """Waits as many seconds as the first response says; the third and later calls for a prompt return at once."""
    _calls[group.id] = _calls.get(group.id, 0) + 1
    text = group.responses[0].text
    if text == "fail twice" and _calls[group.id] <= 2:
        raise ConnectionError("the judge is busy")
    if text == "die once" and not os.path.exists(group.answer):
        open(group.answer, "w").close()
        os._exit(7)
    if text == "block":
        time.sleep(600)
    if text in ("raise", "die"):
        return [_obey(text)]
    await asyncio.sleep(float(text) if text.replace(".", "").isdigit() else 0)
    return [Grade(1.0, "seen")] * len(group.responses)


def three_arguments(group: GroupToGrade, more: int, most: int) -> list[float]:
    return [1.0]
