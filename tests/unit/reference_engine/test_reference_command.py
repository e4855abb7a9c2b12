"""How the reference engine is started, and the settings it refuses."""

import json
import sys
from pathlib import Path

import pytest

from minpro_megatron.config.run import RunConfig
from minpro_megatron.serving.server_command import server_command
from tests.support.rollout_fakes import run_config


def config(tmp_path: Path, **server: object) -> RunConfig:
    (tmp_path / "config.json").write_text('{"vocab_size": 27, "eos_token_id": 1, "max_position_embeddings": 64}')
    values = json.loads(run_config(tmp_path).to_json())
    values["model"]["hf_path"] = str(tmp_path)
    values["server"] |= {"engine": "reference", "device": "cpu", "dtype": "float32"} | server
    return RunConfig.model_validate(values)


def test_the_command_line(tmp_path: Path) -> None:
    command = server_command(config(tmp_path, max_running_requests=7), 1, 31000, 1)
    assert command[:3] == [sys.executable, "-m", "minpro_megatron.reference_engine"]
    assert dict(zip(command[3::2], command[4::2], strict=True)) == {
        "--model-path": str(tmp_path),
        "--host": "127.0.0.1",
        "--port": "31000",
        "--context-length": "22",
        "--max-running-requests": "7",
        "--weight-version": "0",
    }


@pytest.mark.parametrize(("field", "value"), [("device", "cuda"), ("dtype", "bfloat16"), ("tensor_parallel", 2)])
def test_what_it_does_not_have_is_refused(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"server.{field} = .*{value}.* with server.engine = 'reference'"):
        server_command(config(tmp_path, **{field: value}), 0, 31000, 0)
