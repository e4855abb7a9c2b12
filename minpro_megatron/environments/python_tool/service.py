"""The client of a sandbox service that takes SandboxFusion's run_code requests, as verl and CTPO use them."""

import asyncio
import logging
from http import HTTPStatus
from typing import Any

import aiohttp
import msgspec

from minpro_megatron.config.environment import PythonToolConfig
from minpro_megatron.environments.python_tool.outcome import Outcome, outcome
from minpro_megatron.environments.python_tool.sandbox import SandboxFailed

log = logging.getLogger(__name__)

# For a busy service, in addition to the limit of the code.
MARGIN_S = 20.0
ATTEMPTS = 3
FIRST_PAUSE_S = 0.5
_MAX_BODY_BYTES = 16 << 20


class _Run(msgspec.Struct):
    status: str = ""
    stdout: str | None = ""
    stderr: str | None = ""
    return_code: int | None = None


class _Result(msgspec.Struct):
    """SandboxFusion's answer: `status` is Success, Failed or SandboxError; others write it in small letters."""

    status: str
    message: str = ""
    run_result: _Run | None = None


class SandboxService:
    """Runs at most `settings.workers` pieces of code at a time; use inside `async with`."""

    def __init__(self, settings: PythonToolConfig) -> None:
        self._settings = settings
        self._room = asyncio.Semaphore(settings.workers)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "SandboxService":
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=self._settings.timeout_s + MARGIN_S),
            connector=aiohttp.TCPConnector(limit=0),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def run(self, code: str) -> Outcome:
        """The outcome of the code. Raises SandboxFailed if the service does not answer as it should."""
        async with self._room:
            pause_s = FIRST_PAUSE_S
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    return self._outcome(await self._post(code))
                except SandboxFailed as error:
                    if attempt == ATTEMPTS:
                        raise
                    log.warning("%s; attempt %d of %d failed, retrying", error, attempt, ATTEMPTS)
                    await asyncio.sleep(pause_s)
                    pause_s *= 2
        raise AssertionError("the last attempt returns or raises")

    async def _post(self, code: str) -> _Result:
        assert self._session is not None, "use `async with` around the service"
        settings, url = self._settings, self._settings.url
        request: dict[str, Any] = {
            "code": code,
            "stdin": "",
            "language": "python",
            "compile_timeout": settings.timeout_s,
            "run_timeout": settings.timeout_s,
            "memory_limit_MB": settings.memory_mb,
            "files": {},
            "fetch_files": [],
        }
        try:
            async with self._session.post(url, json=request) as response:
                body = await self._body(response)
                if response.status != HTTPStatus.OK:
                    raise SandboxFailed(f"{url}: status {response.status}: {body[:200].decode(errors='replace')}")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise SandboxFailed(f"{url}: {type(error).__name__}: {error}") from error
        try:
            return msgspec.json.decode(body, type=_Result)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise SandboxFailed(f"{url}: {error} in {body[:200]!r}") from None

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        body = bytearray()
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > _MAX_BODY_BYTES:
                raise SandboxFailed(f"{self._settings.url}: an answer of more than {_MAX_BODY_BYTES} bytes")
        return bytes(body)

    def _outcome(self, result: _Result) -> Outcome:
        run, status = result.run_result, result.status.lower()
        if run is None or status == "sandboxerror":
            raise SandboxFailed(f"{self._settings.url}: {result.status} {result.message}".rstrip())
        return outcome(
            (run.stdout or "") + (run.stderr or ""), self._problem(run, status), self._settings.max_output_chars
        )

    def _problem(self, run: _Run, status: str) -> str:
        if status == "timeout" or run.status.lower() in ("timelimitexceeded", "timeout"):
            return f"the code was ended after the time limit of {self._settings.timeout_s:g} s"
        if status == "success" and not run.return_code:
            return ""
        return f"the code ended with status {run.return_code if run.return_code is not None else status}"
