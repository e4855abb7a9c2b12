"""Grades with services: `reward.function = http` posts each group to one of `reward.urls`.

A request is a JSON object: `id`, `source`, `prompt`, `answer`, `prefix` and `metadata` of the row, and `responses`, a
list of objects with `text`, `num_tokens` and `finish_reason`. The answer is a JSON object with `rewards`, a list with
one finite number per response, in their order.
"""

import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import aiohttp
import msgspec

from minpro_megatron.rewards.forms import GroupToGrade
from minpro_megatron.rewards.judging import GradingFailed, Judgement, judgements

MAX_ANSWER_BYTES = 16 * 2**20
CONNECT_TIMEOUT_S = 10.0
SHOWN_BODY_CHARS = 200


class _Answer(msgspec.Struct):
    rewards: list[float]


_DECODER = msgspec.json.Decoder(_Answer)


def request_body(group: GroupToGrade) -> bytes:
    """The JSON that a service receives for a group."""
    content: dict[str, Any] = {
        "id": group.id,
        "source": group.source,
        "prompt": group.prompt,
        "answer": group.answer,
        "prefix": group.prefix,
        "metadata": group.metadata,
        "responses": [
            {"text": one.text, "num_tokens": len(one.token_ids), "finish_reason": one.finish_reason}
            for one in group.responses
        ],
    }
    return msgspec.json.encode(content)


class RewardServices:
    """The services at `urls`; use inside `async with`. A group goes to the one with the fewest groups under way."""

    def __init__(self, urls: Sequence[str], attempt_timeout_s: float) -> None:
        self._urls = list(urls)
        self._attempt_timeout_s = attempt_timeout_s
        self._under_way = Counter[str]()
        self._last_used = dict.fromkeys(self._urls, 0.0)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "RewardServices":
        # No limit on connections here: reward.concurrency limits the groups under way.
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def judge(self, group: GroupToGrade, within_s: float) -> list[Judgement]:
        """The judgements of a group's responses, from one request. Raises GradingFailed with the URL and the error, at
        the latest after reward.attempt_timeout_s or `within_s` seconds."""
        url = min(self._urls, key=lambda one: (self._under_way[one], self._last_used[one]))
        self._under_way[url] += 1
        self._last_used[url] = time.monotonic()
        try:
            return await self.judge_at(url, group, within_s)
        finally:
            self._under_way[url] -= 1

    async def judge_at(self, url: str, group: GroupToGrade, within_s: float = math.inf) -> list[Judgement]:
        """As `judge`, with the service at `url`."""
        assert self._session is not None, "use `async with` around the services"
        start, limit_s = time.perf_counter(), min(self._attempt_timeout_s, within_s)
        timeout = aiohttp.ClientTimeout(total=limit_s, sock_connect=CONNECT_TIMEOUT_S)
        body, headers = request_body(group), {"Content-Type": "application/json"}
        try:
            async with self._session.post(
                url, data=body, headers=headers, allow_redirects=False, timeout=timeout
            ) as response:
                content = await _read(url, response)
                status = response.status
        except TimeoutError:
            problem = f"{url}: no answer within {limit_s:.1f} s (reward.attempt_timeout_s, reward.deadline_s)"
            raise GradingFailed(problem, timed_out=True) from None
        except (aiohttp.ClientError, OSError) as error:
            raise GradingFailed(f"{url}: {type(error).__name__}: {error}") from None
        if status != 200:
            raise GradingFailed(f"{url}: status {status}: {_shown(content)}")
        try:
            answer = _DECODER.decode(content)
            return judgements(answer.rewards, len(group.responses), time.perf_counter() - start)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise GradingFailed(f"{url}: the answer is invalid: {error}: {_shown(content)}") from None
        except ValueError as error:
            raise GradingFailed(f"{url}: {error}") from None


async def _read(url: str, response: aiohttp.ClientResponse) -> bytes:
    pieces, size = [], 0
    async for piece in response.content.iter_chunked(2**16):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_ANSWER_BYTES:
            raise GradingFailed(f"{url}: the answer has more than {MAX_ANSWER_BYTES / 2**20:g} MiB")
    return b"".join(pieces)


def _shown(content: bytes) -> str:
    return ascii(content[:SHOWN_BODY_CHARS].decode(errors="replace"))
