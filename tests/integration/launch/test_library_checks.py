"""Preflight has what a run hands on checked by SGLang's and Megatron-Core's own classes, in processes of their own."""

import os
from pathlib import Path

import pytest

from minpro_megatron.config.run import with_overrides
from minpro_megatron.launch.preflight.library_checks import megatron_field_problems, server_argument_problems
from minpro_megatron.launch.preflight.run_checks import run_problems
from tests.support.run_examples import example_config, write_example_files


def test_preflight_reports_what_megatron_does_not_know(tmp_path: Path) -> None:
    write_example_files(tmp_path)
    assignments = ["model.megatron.nothing=1", "model.megatron.layernorm_epsilo=1"]
    found = run_problems(with_overrides(example_config(tmp_path), assignments))
    assert [problem.partition(":")[0] for problem in found] == [one.partition("=")[0] for one in assignments]
    assert "(did you mean layernorm_epsilon?)" in found[1]


# What SGLang's own class gives to a parser, with an option that no release has.
SERVER_ARGS = """
class ServerArgs:
    @staticmethod
    def add_cli_args(parser):
        parser.add_argument("--chunked-prefill-size", type=int)
        parser.add_argument("--of-this-sglang")
"""


def test_preflight_asks_the_installed_sglang_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class in place of SGLang's, whose import takes seconds; the long tests below ask SGLang's own."""
    write_example_files(tmp_path)
    package = tmp_path / "packages" / "sglang" / "srt"
    package.mkdir(parents=True)
    (package / "server_args.py").write_text(SERVER_ARGS)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parents[1]), os.environ.get("PYTHONPATH", "")]))
    names = ["of_this_sglang", "chunked_prefil_size", "gc-threshold"]
    assignments = ["server.engine=sglang", *(f"server.arguments.{name}=1" for name in names)]
    misspelt, hyphenated = run_problems(with_overrides(example_config(tmp_path), assignments))
    assert misspelt.startswith("server.arguments.chunked_prefil_size: SGLang's server has no option --chunked-prefil-s")
    assert "(did you mean chunked_prefill_size?)" in misspelt
    assert hyphenated == "server.arguments.gc-threshold: write it with underscores, gc_threshold"


@pytest.mark.long  # SGLang's import takes seconds
def test_preflight_reports_what_the_libraries_refuse(tmp_path: Path) -> None:
    write_example_files(tmp_path)
    assignments = [
        "server.engine=sglang", "server.arguments.chunked_prefil_size=1", "server.arguments.tensor_parallel_size=2",
        "server.arguments.sleep_on_idle=false", "server.arguments.gc-threshold=1", "model.megatron.nothing=1",
    ]  # fmt: skip
    found = run_problems(with_overrides(example_config(tmp_path), assignments))
    assert [problem.partition(":")[0] for problem in found] == [
        "model.megatron.nothing", "server.arguments.chunked_prefil_size",
        "server.arguments.tensor_parallel_size is decided by server.tensor_parallel",
        "server.arguments.sleep_on_idle = false", "server.arguments.gc-threshold",
    ]  # fmt: skip
    assert "(did you mean chunked_prefill_size?)" in found[1]


@pytest.mark.long
def test_preflight_reports_a_value_that_sglang_refuses(tmp_path: Path) -> None:
    write_example_files(tmp_path)
    assignments = ["server.engine=sglang", "server.arguments.stream_interval=often"]
    (problem,) = server_argument_problems(with_overrides(example_config(tmp_path), assignments))
    assert problem.startswith("server.arguments: SGLang refuses the server's options: argument --stream-interval: inv")


def test_a_dispatcher_needs_its_package(tmp_path: Path) -> None:
    settings = with_overrides(example_config(tmp_path), ["parallel.expert=2", "parallel.dispatcher=flex"])
    (problem,) = megatron_field_problems(settings)
    assert "the package deep_ep is not installed; install DeepEP, or set parallel.dispatcher to alltoall" in problem
