"""SGLang's HTTP over the reference engine: the endpoints that serving/client.py and serving/control.py use.

Fields, statuses and answers are those recorded from SGLang 0.5.23. A token id outside the vocabulary, which would crash
SGLang, is refused here with status 400.
"""

import asyncio
import gc
import hashlib
import hmac
import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

import msgspec
from aiohttp import web

from minpro_megatron.reference_engine.engine import CacheInUse, Engine
from minpro_megatron.reference_engine.memory import MemoryParts, OccupiedMemory
from minpro_megatron.reference_engine.requests import (
    Abort,
    CheckWeights,
    DestroyGroup,
    FromDisk,
    FromDistributed,
    FromTensor,
    Generate,
    InitGroup,
    Pause,
    Refused,
    ResponseMaker,
    UpdateVersion,
)
from minpro_megatron.reference_engine.shared_buckets import read_bucket
from minpro_megatron.reference_engine.update_groups import UpdateGroups, UpdateRefused

log = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 256 << 20

type _Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """One handler per kind of request. The event loop only waits: sampling and receiving weights run in threads."""

    def __init__(
        self,
        engine: Engine,
        model_path: str,
        stop_token_ids: tuple[int, ...],
        context_length: int,
        api_key: str | None = None,
    ) -> None:
        self._engine = engine
        self._model_path = model_path
        vocabulary_size = engine.model.architecture.vocab_size
        self._make_responses = ResponseMaker(vocabulary_size, frozenset(stop_token_ids), context_length)
        self._authorization = None if api_key is None else f"Bearer {api_key}"
        self._groups = UpdateGroups()
        self._memory = OccupiedMemory(engine)
        self._update_is_open = False

    def application(self) -> web.Application:
        application = web.Application(client_max_size=MAX_REQUEST_BYTES, middlewares=[self._authorized, _refusals])
        gets = {
            "/health": self._health,
            "/health_generate": self._health_generate,
            "/model_info": self._model_info,
            "/server_info": self._server_info,
            "/flush_cache": self._flush_cache,
        }
        posts = {
            "/generate": self._generate,
            "/abort_request": self._abort,
            "/pause_generation": self._pause,
            "/continue_generation": self._continue,
            "/flush_cache": self._flush_cache,
            "/begin_weight_update": self._begin_update,
            "/end_weight_update": self._end_update,
            "/init_weights_update_group": self._init_group,
            "/destroy_weights_update_group": self._destroy_group,
            "/update_weights_from_distributed": self._update_from_distributed,
            "/update_weights_from_tensor": self._update_from_tensor,
            "/update_weights_from_disk": self._update_from_disk,
            "/update_weight_version": self._update_version,
            "/weights_checker": self._check_weights,
            "/release_memory_occupation": self._release_memory,
            "/resume_memory_occupation": self._resume_memory,
            "/freeze_gc": self._freeze_gc,
        }
        application.add_routes([web.get(path, handler) for path, handler in gets.items()])
        application.add_routes([web.post(path, handler) for path, handler in posts.items()])
        return application

    @web.middleware
    async def _authorized(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode(errors="surrogateescape")  # as aiohttp decodes
        wanted = self._authorization
        if wanted is None or request.path == "/health" or hmac.compare_digest(given, wanted.encode()):
            return await handler(request)
        return _json({"error": "Unauthorized"}, status=HTTPStatus.UNAUTHORIZED)

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _health_generate(self, _: web.Request) -> web.Response:
        await self._between_tokens(lambda: None)  # no answer if the sampling thread hangs
        return web.Response()

    async def _model_info(self, _: web.Request) -> web.Response:
        return _json(
            {
                "model_path": self._model_path,
                "served_model_name": self._model_path,
                "tokenizer_path": self._model_path,
                "is_generation": True,
                "weight_version": self._engine.weight_version,
                "architectures": [self._engine.model.architecture.name],
            }
        )

    async def _server_info(self, _: web.Request) -> web.Response:
        # an update happens between two tokens, so each token is counted for the version that sampled it
        return _json({"disable_overlap_schedule": True})

    async def _generate(self, request: web.Request) -> web.Response:
        asked = await _decoded(request, Generate)
        responses = self._make_responses(asked)
        try:
            await self._between_tokens(lambda: self._engine.add(responses))
        except ValueError as error:
            raise Refused(str(error)) from None
        answers = await asyncio.gather(*(asyncio.wrap_future(response.answer) for response in responses))
        is_list = bool(asked.input_ids) and isinstance(asked.input_ids[0], list)
        return _json(answers if is_list else answers[0])

    async def _abort(self, request: web.Request) -> web.Response:
        asked = await _decoded(request, Abort)
        engine = self._engine
        await self._between_tokens(
            (lambda: engine.abort("")) if asked.abort_all else (lambda: engine.abort_request(asked.rid))
        )
        return web.Response()

    async def _pause(self, request: web.Request) -> web.Response:
        asked = await _decoded(request, Pause)
        await self._between_tokens(lambda: self._engine.pause(asked.mode))
        return _json({"message": "Generation paused successfully.", "status": "ok"})

    async def _continue(self, _: web.Request) -> web.Response:
        await self._between_tokens(self._engine.resume)
        return _json({"message": "Generation continued successfully.", "status": "ok"})

    async def _flush_cache(self, _: web.Request) -> web.Response:
        try:
            await self._between_tokens(self._engine.flush_cache)
        except CacheInUse:
            return web.Response(text="Flush cache failed.\n", status=HTTPStatus.BAD_REQUEST)
        return web.Response(text="Cache flushed.\n")

    async def _begin_update(self, _: web.Request) -> web.Response:
        if self._update_is_open:
            return _outcome("a weight-update session is already open; call end_weight_update() first", success=False)
        self._update_is_open = True
        return _outcome("Success")

    async def _end_update(self, _: web.Request) -> web.Response:
        if not self._update_is_open:
            return _outcome("no weight-update session is open; call begin_weight_update() first", success=False)
        self._update_is_open = False
        return _outcome("Success")

    async def _init_group(self, request: web.Request) -> web.Response:
        asked = await _decoded(request, InitGroup)
        where = msgspec.structs.asdict(asked)
        where["rank"] = where.pop("rank_offset")
        try:
            await asyncio.to_thread(self._groups.join, **where)
        except (UpdateRefused, RuntimeError, ValueError) as error:
            return _outcome(f"Failed to initialize custom process group: {error}.", success=False)
        return _outcome("Succeeded to initialize custom process group.")

    async def _destroy_group(self, request: web.Request) -> web.Response:
        asked = await _decoded(request, DestroyGroup)
        try:
            await asyncio.to_thread(self._groups.leave, asked.group_name)
        except UpdateRefused as error:
            return _outcome(str(error), success=False)
        return _outcome("Succeeded to destroy custom process group.")

    async def _update_from_distributed(self, request: web.Request) -> web.Response:
        asked = await _decoded(request, FromDistributed)
        if not self._update_is_open:
            return _outside_of_an_update("update_weights_from_distributed")
        try:
            tensors = await asyncio.to_thread(
                self._groups.receive,
                asked.group_name,
                asked.names,
                asked.dtypes,
                asked.shapes,
                asked.load_format is not None,
            )
        except (UpdateRefused, RuntimeError) as error:
            return _outcome(str(error), success=False)
        return await self._load(tensors, asked.weight_version, asked.flush_cache, "update parameter online")

    async def _update_from_tensor(self, request: web.Request) -> web.Response:
        asked = await _decoded(request, FromTensor)
        if not self._update_is_open:
            return _outside_of_an_update("update_weights_from_tensor")
        messages = asked.serialized_named_tensors
        try:
            tensors = await asyncio.to_thread(read_bucket, messages[0] if messages else "")
        except UpdateRefused as error:
            return _outcome(str(error), success=False)
        return await self._load(tensors, asked.weight_version, asked.flush_cache, "update parameter online")

    async def _update_from_disk(self, request: web.Request) -> web.Response:
        asked = await _decoded(request, FromDisk)
        try:
            tensors = await asyncio.to_thread(self._engine.model.read, asked.model_path)
        except (ValueError, OSError) as error:
            return _outcome(f"Failed to get weights iterator: {error}.", success=False)
        answer = await self._load(tensors, asked.weight_version, asked.flush_cache, "update model weights")
        if answer.status == HTTPStatus.OK:
            self._model_path = asked.model_path
        return answer

    async def _load(self, tensors: list[Any], version: str | None, flush: bool, what: str) -> web.Response:
        engine = self._engine
        try:
            await asyncio.wrap_future(engine.update(lambda: engine.load_weights(tensors, version)))
            if flush:
                await self._between_tokens(engine.flush_cache)
        except ValueError as error:
            return _outcome(f"Failed to {what}: {error}.", success=False)
        except CacheInUse:
            return _outcome(
                "Weights were updated, but the cache was not flushed because requests are still running or queued. "
                "Retract or finish them, then call /flush_cache.",
                success=False,
            )
        return _outcome(f"Succeeded to {what}." + (f" Weight version updated to {version}." if version else ""))

    async def _update_version(self, request: web.Request) -> web.Response:
        asked, engine = await _decoded(request, UpdateVersion), self._engine
        if asked.abort_all_requests:
            await self._between_tokens(lambda: engine.abort(""))
        await self._between_tokens(lambda: engine.rename_weights(asked.new_version))
        return _outcome(f"Weight version updated to {asked.new_version}")

    async def _check_weights(self, request: web.Request) -> web.Response:
        await _decoded(request, CheckWeights)
        if not await self._between_tokens(lambda: self._memory.has_weights):
            return _outcome("the weights are released", success=False)
        checksums = await self._between_tokens(self._engine.model.checksums)
        lines = (f"{name}={checksum}\n" for name, checksum in sorted(checksums.items()))
        total = hashlib.sha256("".join(lines).encode()).hexdigest()
        place = {"tp_rank": 0, "tp_size": 1, "dp_rank": 0, "dp_size": 1, "pp_rank": 0, "pp_size": 1}
        place |= {"role": "target", "rank": 0, "size": 1}
        rank = {"checksums": checksums, "per_gpu_checksum": total, "parallelism_info": [place]}
        return _json({"success": True, "message": "Success.", "ranks": [rank], "per_engine_checksum": total})

    async def _release_memory(self, request: web.Request) -> web.Response:
        asked = await _decoded(request, MemoryParts)
        await self._between_tokens(lambda: self._memory.release(asked))
        return _json(None)

    async def _resume_memory(self, request: web.Request) -> web.Response:
        asked = await _decoded(request, MemoryParts)
        await self._between_tokens(lambda: self._memory.resume(asked))
        return _json(None)

    async def _freeze_gc(self, _: web.Request) -> web.Response:
        gc.freeze()
        return web.Response()

    async def _between_tokens[Result](self, function: Callable[[], Result]) -> Result:
        return await asyncio.wrap_future(self._engine.call(function))


@web.middleware
async def _refusals(request: web.Request, handler: _Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except Refused as error:
        log.warning("%s refused: %s", request.path, error)
        return _json({"error": {"message": str(error)}}, status=HTTPStatus.BAD_REQUEST)


async def _decoded[Fields](request: web.Request, kind: type[Fields]) -> Fields:
    try:
        return msgspec.json.decode(await request.read() or b"{}", type=kind)
    except msgspec.DecodeError as error:
        raise Refused(str(error)) from None


def _json(content: Any, status: HTTPStatus = HTTPStatus.OK) -> web.Response:
    return web.Response(body=msgspec.json.encode(content), status=status, content_type="application/json")


def _outside_of_an_update(request: str) -> web.Response:
    return _outcome(f"{request} must run between begin_weight_update() and end_weight_update()", success=False)


def _outcome(message: str, success: bool = True) -> web.Response:
    return _json({"success": success, "message": message}, status=HTTPStatus.OK if success else HTTPStatus.BAD_REQUEST)
