"""Settings of the role serve."""

from pathlib import Path

from minpro_megatron.config.run import RunConfig
from tests.support.rollout_fakes import run_config


def config(tmp_path: Path, **server: object) -> RunConfig:
    values = run_config(tmp_path).model_dump()
    values["server"] |= server
    return RunConfig.model_validate(values)
