"""What a listening address is to others, and the URLs that servers and collector state for themselves."""

import asyncio
import json
import socket
import urllib.request
from pathlib import Path
from urllib.error import HTTPError

import pytest

from minpro_megatron.collector.api import CollectorApi
from minpro_megatron.feed.protocol import COLLECTOR_ENDPOINT
from minpro_megatron.serving.addresses import is_all_interfaces, is_loopback, url_here


@pytest.mark.parametrize(
    ("host", "loopback", "all_interfaces", "url"),
    [
        ("127.0.0.1", True, False, "http://127.0.0.1:80"),
        ("127.0.1.1", True, False, "http://127.0.1.1:80"),
        ("localhost", True, False, "http://localhost:80"),
        ("::1", True, False, "http://[::1]:80"),
        ("0.0.0.0", False, True, "http://127.0.0.1:80"),
        ("::", False, True, "http://[::1]:80"),
        ("0:0:0:0:0:0:0:0", False, True, "http://[::1]:80"),
        ("0", False, True, "http://127.0.0.1:80"),
        ("127.1", True, False, "http://127.1:80"),
        ("10.0.0.7", False, False, "http://10.0.0.7:80"),
        ("fd00::7", False, False, "http://[fd00::7]:80"),
        ("127.example.org", False, False, "http://127.example.org:80"),
    ],
)
def test_a_listening_address(host: str, loopback: bool, all_interfaces: bool, url: str) -> None:
    assert (is_loopback(host), is_all_interfaces(host), url_here(host, 80)) == (loopback, all_interfaces, url)


def _has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.parametrize(
    ("host", "stated"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),
        pytest.param("::", "[::1]", marks=pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6")),
    ],
)
def test_the_collector_states_an_address_that_it_answers(tmp_path: Path, host: str, stated: str) -> None:
    def status_of(url: str) -> int:
        try:
            return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10).status
        except HTTPError as error:
            return error.code

    async def main() -> None:
        async with CollectorApi(tmp_path, host, 0, incarnation=1):
            url = json.loads((tmp_path / COLLECTOR_ENDPOINT).read_text())["url"]
            assert url.rpartition(":")[0] == f"http://{stated}"
            assert await asyncio.to_thread(status_of, f"{url}/v1/batch/0") == 409  # of no incarnation

    asyncio.run(main())
