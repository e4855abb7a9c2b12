"""Checks whether a server answers, in a thread so that a silent server does not block anything else."""

import json
import threading
import time
from collections.abc import Callable, Mapping
from enum import Enum
from http import HTTPStatus

import requests

from minpro_megatron.serving.answer_limits import MAX_INFO_BYTES, MAX_SETTINGS_BYTES, BodyTooLarge, read_body
from minpro_megatron.serving.errors import WRONG_KEY

# SGLang itself gives up after 20 s.
GENERATION_TIMEOUT_S = 30.0


class Health(Enum):
    """The result of one health check."""

    ANSWERS = "answers"
    GONE = "gone"  # no process listens there: the server has ended
    SILENT = "silent"  # no answer in time, or an answer that it cannot work
    FORBIDDEN = "forbidden"  # it requires another API key


def ask(url: str, headers: Mapping[str, str], timeout_s: float) -> Health:
    """Requests /model_info, which SGLang answers even while generation is paused, unlike /health."""
    return _health(_status(f"{url}/model_info", headers, timeout_s))


def ask_to_generate(url: str, headers: Mapping[str, str], timeout_s: float) -> Health:
    """Requests a token, which a server that hangs or is paused does not generate. If the server does not have this
    request, the result is that of `ask`."""
    status = _status(f"{url}/health_generate", headers, max(timeout_s, GENERATION_TIMEOUT_S))
    return ask(url, headers, timeout_s) if status == HTTPStatus.NOT_FOUND else _health(status)


def _health(status: int | Health) -> Health:
    if isinstance(status, Health):
        return status
    if status in WRONG_KEY:
        return Health.FORBIDDEN
    return Health.ANSWERS if status == HTTPStatus.OK else Health.SILENT


def _status(url: str, headers: Mapping[str, str], timeout_s: float) -> int | Health:
    """The status of the answer, or the health if there is no answer."""
    with requests.Session() as session:
        session.trust_env = False  # no proxy between the roles and their servers
        try:
            with session.get(url, headers=dict(headers), timeout=timeout_s, stream=True) as response:
                read_body(response, MAX_INFO_BYTES)
                return response.status_code
        except BodyTooLarge:
            return Health.SILENT
        except requests.ConnectTimeout:
            return Health.SILENT
        except requests.ConnectionError as error:
            return Health.GONE if _is_refusal(error) else Health.SILENT
        except requests.RequestException:
            return Health.SILENT


def overlaps_scheduling(url: str, headers: Mapping[str, str], timeout_s: float) -> bool | None:
    """Whether the server prepares a token while the previous one is still being sampled; None if it is not reported."""
    with requests.Session() as session:
        session.trust_env = False
        try:
            with session.get(f"{url}/server_info", headers=dict(headers), timeout=timeout_s, stream=True) as answer:
                body = read_body(answer, MAX_SETTINGS_BYTES)
            return not json.loads(body)["disable_overlap_schedule"]
        except (requests.RequestException, ValueError, KeyError, TypeError, RecursionError):  # ValueError: no JSON
            return None


def _is_refusal(error: BaseException | None) -> bool:
    """Whether no process listens at the address. A connection that broke, or a name that does not resolve now, may be a
    fault of the network instead."""
    while error is not None:
        if isinstance(error, ConnectionRefusedError):
            return True
        wrapped = getattr(error, "reason", None) or (error.args[0] if error.args else None)
        error = wrapped if isinstance(wrapped, BaseException) else error.__cause__ or error.__context__
    return False


class Question[Answer](threading.Thread):
    """One call in a thread; `answer` is None until it has returned. `is_over` raises an exception of the call."""

    def __init__(self, call: Callable[[], Answer]) -> None:
        super().__init__(daemon=True)  # the program ends without waiting for an answer
        self._call = call
        self._error: BaseException | None = None
        self.answer: Answer | None = None
        self.asked_at = time.monotonic()
        self.start()

    def run(self) -> None:
        try:
            self.answer = self._call()
        except BaseException as error:
            self._error = error

    def is_over(self) -> bool:
        if self._error is not None:
            raise self._error
        return not self.is_alive()
