"""A run does not start in an environment that lacks a package of its roles."""

from pathlib import Path

import pytest

from minpro_megatron.config.run import with_overrides
from minpro_megatron.launch.preflight.package_check import package_problems
from tests.support.run_examples import example_config


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ([], ["torch", "megatron", "matplotlib", "tensorboard", "sglang"]),
        (["server.engine=reference"], ["torch", "megatron", "matplotlib", "tensorboard"]),
        (["debug.trainer=timer", 'server.urls=["http://localhost:30000"]'], []),
    ],
)
def test_each_missing_package_has_a_line(changes: list[str], needed: list[str], tmp_path: Path) -> None:
    config = with_overrides(example_config(tmp_path), changes)
    lines = list(package_problems(config, is_installed=lambda name: False))
    assert [line.split()[2] for line in lines] == needed
    assert all(" is not installed in " in line and "pip install '.[" in line for line in lines)
    assert list(package_problems(config)) == []
