"""A backend that the ranks could not import is named before any of them starts."""

from pathlib import Path

import pytest

from minpro_megatron.launch.preflight import problems
from tests.unit.run_examples import example_config, write_example_files


def config(folder: Path, backend: str):
    write_example_files(folder)
    good = example_config(folder)
    # a copy is not validated: without a GPU RunConfig refuses the backend before anything is imported
    return good.model_copy(update={"model": good.model.model_copy(update={"backend": backend})})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No module named 'transformer_engine"),
        ('raise OSError("libcudart.so.13: cannot open shared object file")', "OSError: libcudart.so.13: cannot open"),
        ("import os; os._exit(9)", "exit code 9"),
    ],
    ids=["absent", "broken", "fatal"],
)
def test_transformer_engine_must_be_importable(
    content: str | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        package = tmp_path / "packages" / "transformer_engine"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "pytorch.py").write_text(content)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    (problem,) = problems(config(tmp_path, "transformer_engine"))
    assert problem.startswith("model.backend = transformer_engine: it cannot be imported (")
    assert reason in problem
    assert problem.endswith("or set model.backend to auto or torch")


def test_a_backend_that_imports_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "packages" / "transformer_engine"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "pytorch.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    assert problems(config(tmp_path, "transformer_engine")) == []


def test_what_is_not_asked_for_by_name_is_not_needed(tmp_path: Path) -> None:
    for backend in ("auto", "torch"):
        assert problems(config(tmp_path, backend)) == []
