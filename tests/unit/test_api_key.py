"""The servers' API key: where it comes from, and where it must not show."""

import logging
import sys

import pytest

from minpro_megatron.config.rollout import ServerConfig
from minpro_megatron.serving import sglang_main
from minpro_megatron.serving.api_key import api_key, authorization

SERVER = ServerConfig(api_key_variable="THE_KEY")


def test_it_comes_from_the_named_variable() -> None:
    assert api_key(SERVER, {"THE_KEY": "k-1"}) == "k-1"
    assert authorization(SERVER, {"THE_KEY": "k-1"}) == {"Authorization": "Bearer k-1"}
    assert authorization(ServerConfig(), {"THE_KEY": "k-1"}) == {}


@pytest.mark.parametrize(
    ("value", "problem"), [("", "is not set"), ("a\n", "printable ASCII"), ("a b", "printable"), ("ä", "printable")]
)
def test_a_key_that_is_missing_or_damaged_is_named_but_not_shown(value: str, problem: str) -> None:
    with pytest.raises(ValueError, match=rf"server.api_key_variable = 'THE_KEY'.*{problem}") as caught:
        api_key(SERVER, {"THE_KEY": value})
    assert "a b" not in str(caught.value)


def test_the_server_takes_it_from_the_environment_and_no_log_line_shows_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_record = logging.getLogRecordFactory()
    monkeypatch.setenv(sglang_main.API_KEY_VARIABLE, "k-secret")
    monkeypatch.setattr(sys, "argv", ["server"])
    try:
        sglang_main._take_api_key()
        logging.getLogger("any").warning("args=%s %d", {"api_key": "k-secret"}, 7)
        logging.getLogger("any").warning("other %s", "text")
    finally:
        logging.setLogRecordFactory(make_record)
    assert sys.argv == ["server", "--api-key", "k-secret"]
    assert [record.getMessage() for record in caplog.records] == ["args={'api_key': '<API key>'} 7", "other text"]
    assert sglang_main.API_KEY_VARIABLE not in sglang_main.os.environ
