"""A function that a setting names by import path is called before a process of the run starts."""

import os
from pathlib import Path

import pytest

from minpro_megatron.config.run import with_overrides
from minpro_megatron.launch.preflight.hook_check import hook_problems
from minpro_megatron.launch.preflight.run_checks import problems
from tests.support.run_examples import example_config, write_example_files

HOOKS = """
print("a module that talks at import")
def one(rewards, lengths): return [1.0]
def raises(rewards, lengths): return {}["x"]
def keeps(group): return None
def objective(tokens, settings): return tokens.mask_L
def careless(tokens, settings):
    import dataclasses
    from docs.examples.objective import smooth_cispo
    found = smooth_cispo(tokens, {})
    return dataclasses.replace(found, value_L=found.value_L / 0.0)
"""
EXAMPLES = (
    "objective.name=docs.examples.objective:smooth_cispo", "objective.settings.scale=1.5",
    "loss.advantage=docs.examples.advantage:shorter_is_better", "data.filter=docs.examples.filter:teaches",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_example_files(tmp_path)
    (tmp_path / "my_hooks.py").write_text(HOOKS)
    (tmp_path / "fatal_hooks.py").write_text("import os\nos.write(2, b'no licence\\n')\nos._exit(9)\n")
    monkeypatch.setenv("PYTHONPATH", f"{os.getcwd()}:{tmp_path}")
    return tmp_path


def found(folder: Path, *overrides: str) -> list[str]:
    return list(hook_problems(with_overrides(example_config(folder), list(overrides))))


def test_the_examples_are_no_problem(folder: Path) -> None:
    assert found(folder, *EXAMPLES) == []
    assert problems(with_overrides(example_config(folder), list(EXAMPLES))) == []


def test_every_hook_has_its_line(folder: Path) -> None:
    lines = found(
        folder, "loss.advantage=my_hooks:one", "data.filter=my_hooks:keeps", "objective.name=my_hooks:objective"
    )
    assert lines == [
        "objective.name = my_hooks:objective: it must return ObjectiveTerms, not Tensor",
        "loss.advantage = my_hooks:one: it returned shape (1,) for 4 responses; return one number each",
        "data.filter = my_hooks:keeps: it must return True (keep the group) or False, not NoneType",
    ]


def test_what_cannot_be_used_is_one_line_with_its_setting(folder: Path) -> None:
    told = {
        "objective.name=my_hooks:careless": "value_L is not finite for 4 trained tokens whose log-ratio and advantage",
        "loss.advantage=my_hooks:raises": "KeyError: 'x' (",
        "data.filter=nowhere:f": "it cannot be loaded: ModuleNotFoundError: No module named 'nowhere'; the module",
    }
    lines = found(folder, *told)
    for line, (override, problem) in zip(lines, told.items(), strict=True):
        assert line.startswith(f"{override.replace('=', ' = ')}: {problem}")
        assert "\n" not in line


def test_a_module_that_ends_its_process_is_one_line(folder: Path) -> None:
    assert found(folder, "data.filter=fatal_hooks:f") == [
        "data.filter = fatal_hooks:f: the process that tries them ended with exit code 9 (no licence)"
    ]


@pytest.mark.long  # a process of its own, for one more error of an import
def test_a_name_that_its_module_lacks_is_one_line(folder: Path) -> None:
    (line,) = found(folder, "loss.advantage=my_hooks:nope")
    assert line.startswith("loss.advantage = my_hooks:nope: it cannot be loaded: AttributeError: module 'my_hooks' has")
