"""Samples in one thread, token by token; all other requests to the engine are executed between two tokens."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

import torch

from minpro_megatron.reference_engine.model import KeyValueCache, Model
from minpro_megatron.reference_engine.responses import Response

log = logging.getLogger(__name__)

# Number of prompts whose keys and values are kept for the other responses of their groups.
MAX_PREFIXES = 64

type _Call = tuple[Future[Any], Callable[[], Any]]


class CacheInUse(Exception):
    """The cache cannot be flushed: running responses need it."""


class Engine:
    """Samples one token of each response in turn. Each is computed alone, so its tokens do not depend on the others.

    `call` and `update` may be called from any thread, and the other public methods only in the functions they run.
    """

    def __init__(self, model: Model, weight_version: str, max_running: int) -> None:
        self.model = model
        self.weight_version = weight_version
        self._max_running = max_running
        self._is_paused = False
        self._arriving: deque[Response] = deque()  # waits until generation continues and no update is pending
        self._waiting: deque[Response] = deque()
        self._running: deque[Response] = deque()
        self._updates: deque[_Call] = deque()
        # Prompt -> the cache of all its tokens except the last; its responses fill it together and then copy it.
        self._prefixes: dict[tuple[int, ...], KeyValueCache] = {}
        self._calls: SimpleQueue[_Call] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="sampling", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def call[Result](self, function: Callable[[], Result]) -> Future[Result]:
        """Runs `function` in the sampling thread, before the next token."""
        future: Future[Result] = Future()
        self._calls.put((future, function))
        return future

    def update[Result](self, function: Callable[[], Result]) -> Future[Result]:
        """Runs `function`, which changes weights: at once if generation is paused, otherwise after all running
        responses have ended, while new ones wait. SGLang does the same."""
        future: Future[Result] = Future()
        self._calls.put((Future(), lambda: self._updates.append((future, function))))
        return future

    # The following methods run in the sampling thread.

    def add(self, responses: list[Response]) -> None:
        """Raises ValueError if a request with the same id is running."""
        live = {response.request_id for response in self._under_way()}
        for response in responses:
            if response.request_id in live:
                raise ValueError(f"Duplicate request ID detected: {response.request_id}")
            live.add(response.request_id)
        self._arriving.extend(responses)

    def pause(self, mode: str) -> None:
        """`in_place` keeps the caches, `retract` frees them, `abort` ends the responses."""
        self._is_paused = True
        if mode == "abort":
            self.abort("")
        elif mode == "retract":
            self._waiting.extendleft(reversed(self._running))
            self._running.clear()
            for response in self._waiting:
                response.retract()

    def resume(self) -> None:
        self._is_paused = False

    def abort_request(self, request_id: str) -> None:
        """Ends the response with this id and, as SGLang does, every response whose id begins with it."""
        if any(response.request_id == request_id for response in self._under_way()):
            self.abort(request_id)

    def abort(self, prefix: str) -> None:
        """Ends every response whose request id begins with `prefix`, with its tokens so far."""
        for queue in (self._arriving, self._waiting, self._running):
            kept = [response for response in queue if not response.request_id.startswith(prefix)]
            for response in queue:
                if response.request_id.startswith(prefix):
                    response.abort(self.weight_version)
            queue.clear()
            queue.extend(kept)

    def flush_cache(self) -> None:
        """Raises CacheInUse if a response has keys and values."""
        if any(response.cache is not None for response in self._under_way()):
            raise CacheInUse
        self._prefixes.clear()

    def is_idle(self) -> bool:
        """Whether no response is under way; while generation is paused, new ones may wait."""
        return not (self._running or self._waiting or (self._arriving and not self._is_paused))

    def load_weights(self, tensors: list[tuple[str, torch.Tensor]], version: str | None) -> None:
        """Raises ValueError for a wrong shape. Running responses keep their caches, prompts do not."""
        self.model.load(tensors)
        self._prefixes.clear()
        if version is not None:
            self.weight_version = version

    def rename_weights(self, version: str) -> None:
        """Sets the version of the tokens sampled from now on; the weights do not change."""
        self.weight_version = version

    def _under_way(self) -> list[Response]:
        queues = (self._arriving, self._waiting, self._running)
        return [response for queue in queues for response in queue if not response.answer.cancelled()]

    def _run(self) -> None:
        torch.set_num_threads(1)  # in this thread: the order of a sum depends on the number of threads
        with torch.inference_mode():
            while True:
                self._answer_calls(wait=self._is_paused or not (self._running or self._waiting))
                if self._updates and (self._is_paused or not (self._running or self._waiting)):
                    _answer(self._updates.popleft())
                if not self._is_paused:
                    self._admit()
                    if self._running:
                        self._advance(self._running.popleft())

    def _answer_calls(self, wait: bool) -> None:
        if wait and not self._updates:
            _answer(self._calls.get())
        while not self._calls.empty():
            _answer(self._calls.get())

    def _admit(self) -> None:
        if not self._updates:
            self._waiting.extend(self._arriving)
            self._arriving.clear()
        while self._waiting and len(self._running) < self._max_running:
            self._running.append(self._waiting.popleft())

    def _advance(self, response: Response) -> None:
        """Computes one token of the response, which then goes to the end of the queue unless it has ended."""
        if response.answer.cancelled():  # its client has disconnected
            return
        try:
            reason = self._step(response)
            if reason is not None:
                response.finish(reason, self.weight_version)
                return
        except Exception as error:
            log.exception("request %s", response.request_id)
            response.fail(error)
            return
        if response.cache is None:  # the prompt first: few prompts are kept, and a started one must not be dropped
            self._running.appendleft(response)
        else:
            self._running.append(response)

    def _step(self, response: Response) -> dict[str, Any] | None:
        cache = response.cache
        if cache is None:
            prefix = self._prefix(response.prompt)
            if prefix.num_tokens < response.num_prompt_tokens - 1:
                self.model.step(response.tokens[prefix.num_tokens], prefix)
                return None
            cache = response.cache = prefix.copy(response.capacity)
        hidden_H = self.model.step(response.tokens[cache.num_tokens], cache)
        if cache.num_tokens < len(response.tokens):  # after a retraction: tokens that were sampled before
            return None
        return response.sample(self.model.logits(hidden_H), self.weight_version)

    def _prefix(self, prompt: tuple[int, ...]) -> KeyValueCache:
        if prompt not in self._prefixes:
            while len(self._prefixes) >= MAX_PREFIXES:
                self._prefixes.pop(next(iter(self._prefixes)))
            self._prefixes[prompt] = KeyValueCache(self.model.architecture, len(prompt) - 1)
        return self._prefixes[prompt]


def _answer(call: _Call) -> None:
    future, function = call
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
