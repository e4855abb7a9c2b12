"""The servers' API key: where it comes from, and where it must not show."""

import argparse
import logging
import stat
import sys
from pathlib import Path

import pytest

from minpro_megatron.config.run import RunConfig
from minpro_megatron.config.server import ServerConfig
from minpro_megatron.serving import sglang_main
from minpro_megatron.serving.api_key import KEY_FILE, api_key, authorization, given_api_key, make_api_key
from tests.support.rollout_fakes import run_config

SERVER = ServerConfig(api_key_variable="THE_KEY")


def config_with(folder: Path, **server: object) -> RunConfig:
    values = run_config(folder).model_dump()
    values["server"] |= server
    return RunConfig.model_validate(values)


def test_it_comes_from_the_named_variable(tmp_path: Path) -> None:
    config = config_with(tmp_path, api_key_variable="THE_KEY")
    make_api_key(config)
    assert not (config.run_dir / KEY_FILE).exists()
    assert api_key(config, {"THE_KEY": "k-1"}) == "k-1"
    assert authorization(config, {"THE_KEY": "k-1"}) == {"Authorization": "Bearer k-1"}


def test_each_start_has_a_key_of_its_own_that_only_this_user_can_read(tmp_path: Path) -> None:
    config = config_with(tmp_path)
    assert authorization(config, {}) == {}  # a role started by hand
    keys = []
    for _ in range(2):
        make_api_key(config)
        keys.append(api_key(config, {}))
        assert stat.S_IMODE((config.run_dir / KEY_FILE).stat().st_mode) == 0o600
    assert len(set(keys)) == 2
    assert all(key is not None and len(key) >= 43 for key in keys)  # 256 bits
    assert authorization(config, {}) == {"Authorization": f"Bearer {keys[1]}"}


def test_servers_of_somebody_else_are_not_given_it(tmp_path: Path) -> None:
    own = config_with(tmp_path)
    make_api_key(own)
    assert api_key(config_with(tmp_path, urls=["http://10.0.0.7:30000"]), {}) is None
    (own.run_dir / KEY_FILE).unlink()
    make_api_key(config_with(tmp_path, urls=["http://10.0.0.7:30000"]))
    assert not (own.run_dir / KEY_FILE).exists()


@pytest.mark.parametrize(
    ("value", "problem"), [("", "is not set"), ("a\n", "printable ASCII"), ("a b", "printable"), ("ä", "printable")]
)
def test_a_key_that_is_missing_or_damaged_is_named_but_not_shown(value: str, problem: str) -> None:
    with pytest.raises(ValueError, match=rf"server.api_key_variable = 'THE_KEY'.*{problem}") as caught:
        given_api_key(SERVER, {"THE_KEY": value})
    assert "a b" not in str(caught.value)


@pytest.mark.parametrize("key", ["k-secret", "-k_secret", "--secret=1"])
def test_the_server_takes_it_from_the_environment_and_no_log_line_shows_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, key: str
) -> None:
    make_record = logging.getLogRecordFactory()
    monkeypatch.setenv(sglang_main.API_KEY_VARIABLE, key)
    monkeypatch.setattr(sys, "argv", ["server"])
    try:
        sglang_main._take_api_key()
        logging.getLogger("any").warning("args=%s %d", {"api_key": key}, 7)
        logging.getLogger("any").warning("other %s", "text")
    finally:
        logging.setLogRecordFactory(make_record)
    parser = argparse.ArgumentParser()  # as SGLang's own
    parser.add_argument("--api-key")
    assert parser.parse_args(sys.argv[1:]).api_key == key
    assert [record.getMessage() for record in caplog.records] == ["args={'api_key': '<API key>'} 7", "other text"]
    assert sglang_main.API_KEY_VARIABLE not in sglang_main.os.environ
