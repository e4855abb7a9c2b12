"""An example of an async grader: a second SGLang server judges the responses by a rubric.

    python -m sglang.launch_server --model-path JUDGE --port 40000
    JUDGE_MODEL=JUDGE JUDGE_URL=http://127.0.0.1:40000 minpro launch RECIPE reward.function=docs.examples.judge:grade

The judge reads the rubric, the question, the reference answer and a response, and continues with one token. The reward
is the probability of the token `1` against the token `0`. It is a number between 0 and 1 for every judge and every
response, needs no text to be parsed, and is the same each time. tests/e2e/test_judge.py runs it with a real server.
"""

import asyncio
import math
import os
from functools import cache
from typing import Any

import aiohttp
from transformers import AutoTokenizer

from minpro_megatron.rewards.forms import GroupToGrade

RUBRIC = """Grade a response. Write 1 if it answers the question, agrees with the reference and has no errors, else 0.
Question: {question}
Reference: {reference}
Response: {response}
Grade (1 or 0):"""
ACCEPT, REFUSE = "1", "0"
MAX_RESPONSE_CHARS = 20_000  # the end of a longer response is judged: the judge's context is limited


def judge_prompt(question: str, reference: str, response: str) -> str:
    """What the judge continues. The response is untrusted: it cannot break out of a format, because the verdict is the
    token after the last line, but it may try to persuade the judge, so look at highly rewarded responses."""
    return RUBRIC.format(question=question, reference=reference, response=response[-MAX_RESPONSE_CHARS:])


@cache
def verdict_tokens(model: str) -> tuple[int, int]:
    """The token ids of ACCEPT and REFUSE. Raises ValueError if one of them is not a single token of the judge."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in (ACCEPT, REFUSE)]
    if any(len(tokens) != 1 for tokens in ids):
        raise ValueError(f"{ACCEPT!r} and {REFUSE!r} must be single tokens of JUDGE_MODEL = {model}; choose others")
    return ids[0][0], ids[1][0]


async def grade(group: GroupToGrade) -> list[float]:
    """The probability of ACCEPT against REFUSE for each response, from one request for the whole group.

    An error of the server raises here, and the run calls the function again, with growing pauses.
    """
    model, url = os.environ["JUDGE_MODEL"], os.environ["JUDGE_URL"]
    accept, refuse = await asyncio.to_thread(verdict_tokens, model)
    request = {
        "text": [judge_prompt(group.prompt, group.answer, response.text) for response in group.responses],
        "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
        "return_logprob": True,
        "token_ids_logprob": [accept, refuse],
    }
    async with (
        aiohttp.ClientSession(raise_for_status=True) as session,
        session.post(f"{url}/generate", json=request) as found,
    ):
        judged = await found.json()
    return [_probability(one["meta_info"]["output_token_ids_logprobs"][0], accept, refuse) for one in judged]


def _probability(logprobs: list[list[Any]], accept: int, refuse: int) -> float:
    """From SGLang's (log-prob, token id, text) of the two tokens at the first new position."""
    by_token = {int(token): float(log_prob) for log_prob, token, *_ in logprobs}
    return 1 / (1 + math.exp(min(by_token[refuse] - by_token[accept], 700.0)))
