"""A backend that the ranks could not import is named before any of them starts."""

from collections.abc import Callable
from pathlib import Path

import pytest

from minpro_megatron.config.run import RunConfig
from minpro_megatron.launch.preflight.backend_check import layer_backend_problems
from minpro_megatron.launch.preflight.run_checks import problems
from minpro_megatron.launch.run_folder import first_lines
from minpro_megatron.planning.memory import compute_of
from tests.support.run_examples import example_config, write_example_files

ABSENT_PART = "Could not find shared object file for Transformer Engine torch lib."


def config(folder: Path, backend: str, device: str = "cuda", dtype: str = "bfloat16") -> RunConfig:
    write_example_files(folder)
    good = example_config(folder)
    model = good.model.model_copy(update={"backend": backend, "dtype": dtype})
    return good.model_copy(update={"model": model, "device": device})


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Gives the checked process a torch, and a transformer_engine of this content if there is one."""

    def write(content: str | None) -> None:
        packages = tmp_path / "packages"
        (packages / "torch").mkdir(parents=True)
        (packages / "torch" / "__init__.py").write_text("")
        if content is not None:
            (packages / "transformer_engine").mkdir()
            (packages / "transformer_engine" / "__init__.py").write_text("")
            (packages / "transformer_engine" / "pytorch.py").write_text(content)
        monkeypatch.setenv("PYTHONPATH", str(packages))
        monkeypatch.syspath_prepend(str(packages))

    return write


@pytest.mark.parametrize("backend", ["auto", "transformer_engine"])
@pytest.mark.parametrize(
    ("content", "reason", "remedy"),
    [
        (None, "No module named 'transformer_engine", "install it ("),
        ('raise OSError("libcudart.so.13: cannot open shared object file")', "OSError: libcudart.so.13", "install it"),
        (f"raise FileNotFoundError('{ABSENT_PART}')", ABSENT_PART, "install its part transformer_engine_torch in the"),
        ("import os; os._exit(9)", "exit code 9", "install it"),
    ],
    ids=["absent", "broken", "without its torch extension", "fatal"],
)
def test_transformer_engine_must_be_importable(
    backend: str,
    content: str | None,
    reason: str,
    remedy: str,
    tmp_path: Path,
    install: Callable[[str | None], None],
) -> None:
    install(content)
    (problem,) = layer_backend_problems(config(tmp_path, backend))
    assert problem.startswith(f"model.backend = {backend}: Transformer Engine cannot be imported (")
    assert reason in problem
    assert remedy in problem
    assert problem.endswith("or set model.backend to torch")


def test_torch_is_imported_before_transformer_engine(tmp_path: Path, install: Callable[[str | None], None]) -> None:
    """Its core library needs NCCL, which may be nowhere but in a wheel that torch loads."""
    install("import sys\nif 'torch' not in sys.modules: raise OSError('libnccl.so.2: cannot open shared object file')")
    assert list(layer_backend_problems(config(tmp_path, "transformer_engine"))) == []


@pytest.mark.parametrize(("backend", "device", "dtype"), [("torch", "cuda", "bfloat16"), ("auto", "cpu", "float32")])
def test_a_part_of_transformer_engine_that_keeps_megatron_from_starting_is_named(
    backend: str, device: str, dtype: str, tmp_path: Path, install: Callable[[str | None], None]
) -> None:
    install(f"raise FileNotFoundError('{ABSENT_PART}')")
    (problem,) = layer_backend_problems(config(tmp_path, backend, device, dtype))
    assert problem.startswith(f"model.backend = {backend}: Megatron-Core cannot be imported with this Transformer")
    assert problem.endswith("transformer_engine_torch in the same version, or uninstall transformer_engine")


@pytest.mark.parametrize("content", [None, "raise ImportError('megatron goes on without it')"])
def test_what_is_not_asked_for_is_not_needed(
    content: str | None, tmp_path: Path, install: Callable[[str | None], None]
) -> None:
    install(content)
    assert list(layer_backend_problems(config(tmp_path, "torch"))) == []
    assert problems(config(tmp_path, "auto", "cpu", "float32")) == []


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "chosen", "fused"),
    [
        ("auto", "cuda", "bfloat16", "Transformer Engine", True),
        ("torch", "cuda", "bfloat16", "torch", False),
        ("auto", "cuda", "float32", "torch", False),
        ("auto", "cpu", "float32", "", False),
    ],
)
def test_the_first_lines_and_the_plan_name_one_choice(
    backend: str, device: str, dtype: str, chosen: str, fused: bool, tmp_path: Path
) -> None:
    asked = config(tmp_path, backend, device, dtype)
    named = [line for line in first_lines(asked, 0, goes_on=False) if "layers" in line]
    assert named == ([f"layers computed by {chosen} (model.backend = {backend})"] if chosen else [])
    assert compute_of(asked).fused == fused
