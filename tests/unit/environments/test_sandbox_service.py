"""The client of a sandbox service: SandboxFusion's answers and CTPO's, and services that fail."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from minpro_megatron.config.environment import PythonToolConfig
from minpro_megatron.environments.environment import Answer, EpisodeTurn
from minpro_megatron.environments.python_tool import service
from minpro_megatron.environments.python_tool.tool import PythonTool
from minpro_megatron.records import Prompt

Handler = Callable[[dict[str, Any]], Awaitable[web.StreamResponse]]


def answer_of(handler: Handler, **settings: Any) -> Answer:
    """The tool's answer to a turn with one call, from a service with this handler."""

    async def handle(request: web.Request) -> web.StreamResponse:
        return await handler(await request.json())

    async def main() -> Answer | None:
        application = web.Application()
        application.router.add_post("/run_code", handle)
        async with TestServer(application) as server:
            config = PythonToolConfig(sandbox="service", url=str(server.make_url("/run_code")), **settings)
            async with PythonTool(config) as tool:
                turn = EpisodeTurn(Prompt(id="p", source="s", text="", answer=""), 0, 1, "```python\nprint(6*7)\n```")
                return await tool.answer(turn)

    answer = asyncio.run(main())
    assert answer is not None
    assert answer.tool_calls == 1
    return answer


def result(outcome: str, **run: Any) -> dict[str, Any]:
    return {"status": outcome, "message": "", "compile_result": None, "run_result": run, "files": {}}


@pytest.mark.parametrize(
    ("made", "text", "problem"),
    [
        (result("Success", status="Finished", stdout="42\n", stderr="", return_code=0, execution_time=0.1), "42", ""),
        (
            result("Failed", status="Finished", stdout="a\n", stderr="NameError: b\n", return_code=1),
            "a\nNameError: b\nerror: the code ended with status 1",
            "the code ended with status 1",
        ),
        (
            result("Failed", status="TimeLimitExceeded", stdout="", stderr=""),
            "error: the code was ended after the time limit of 10 s",
            "the code was ended after the time limit of 10 s",
        ),
        # CTPO's own service
        ({"status": "success", "run_result": {"stdout": "42\n", "stderr": ""}, "created_at": "2026"}, "42", ""),
        (
            {"status": "runtime_error", "run_result": {"stdout": "", "stderr": "boom\n"}},
            "boom\nerror: the code ended with status runtime_error",
            "the code ended with status runtime_error",
        ),
    ],
)
def test_answers_of_the_service(made: dict[str, Any], text: str, problem: str) -> None:
    asked = []

    async def handler(request: dict[str, Any]) -> web.Response:
        asked.append(request)
        return web.json_response(made)

    found = answer_of(handler, memory_mb=128)
    assert (found.text, found.problem) == (text, problem)
    assert asked == [
        {
            "code": "print(6*7)", "stdin": "", "language": "python", "compile_timeout": 10.0, "run_timeout": 10.0,
            "memory_limit_MB": 128, "files": {}, "fetch_files": [],
        }
    ]  # fmt: skip


@pytest.mark.parametrize(
    "made",
    [
        lambda: web.Response(status=504, text="gateway timeout"),
        lambda: web.Response(text="no JSON"),
        lambda: web.Response(body=b'{"status": "\xff"}'),
        lambda: web.Response(text='{"files": ' + "[" * 20000),
        lambda: web.json_response({"run_result": {}}),
        lambda: web.json_response(result("SandboxError")),
    ],
)
def test_a_failing_service_is_asked_again_and_then_told_to_the_policy(
    made: Callable[[], web.Response], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "FIRST_PAUSE_S", 0.001)
    num_asked = 0

    async def handler(request: dict[str, Any]) -> web.Response:
        nonlocal num_asked
        num_asked += 1
        return made()

    found = answer_of(handler)
    assert num_asked == service.ATTEMPTS
    assert found.text == "error: the tool is not available at this time"
    assert found.problem.startswith("not run: http://")


def test_a_service_that_comes_back_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "FIRST_PAUSE_S", 0.001)
    answers = iter([web.Response(status=502), web.json_response(result("Success", status="Finished", stdout="42"))])

    async def handler(request: dict[str, Any]) -> web.Response:
        return next(answers)

    assert answer_of(handler).text == "42"


def test_an_endless_answer_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(service, "_MAX_BODY_BYTES", 1000)

    async def handler(request: dict[str, Any]) -> web.Response:
        return web.Response(body=b" " * 5000)

    assert "an answer of more than 1000 bytes" in answer_of(handler).problem
