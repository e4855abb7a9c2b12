"""A function of the user's: found by its import path, named in every error."""

import traceback
from pathlib import Path

import pytest

from minpro_megatron.errors import UserError
from minpro_megatron.hooks.hook import Hook, is_import_path

MARKER = "imported.txt"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the user's whose import leaves a file."""
    folder = tmp_path / "hooked_package"
    (folder / "inner").mkdir(parents=True)
    marking = f"open({str(tmp_path / MARKER)!r}, 'w').close()\n"
    (folder / "__init__.py").write_text(marking)
    (folder / "inner" / "rules.py").write_text(marking + "number = 3\ndef twice(value): return 2 * value\n")
    (folder / "broken.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


@pytest.mark.parametrize("text", ["a:b", "package.module:function", "_a.b_1:c", "paquet.é:f"])
def test_an_import_path_is_a_module_and_a_function(text: str) -> None:
    assert is_import_path(text)


@pytest.mark.parametrize("text", ["", "a", "a.b", ":b", "a:", "a b:c", "a:b.c", "a..b:c", "../x:y", "1a:b", "a:b:c"])
def test_other_texts_are_none(text: str) -> None:
    assert not is_import_path(text)


def test_the_source_file_is_found_without_running_anything(package: Path) -> None:
    assert Hook("loss.advantage", "hooked_package.inner.rules:twice").source_file() == package / "inner" / "rules.py"
    assert Hook("loss.advantage", "hooked_package:twice").source_file() == package / "__init__.py"
    assert Hook("loss.advantage", "hooked_package.missing:twice").source_file() is None
    assert Hook("loss.advantage", "builtins:len").source_file() is None
    assert not (package.parent / MARKER).exists()


def test_the_function_is_loaded(package: Path) -> None:
    assert Hook("loss.advantage", "hooked_package.inner.rules:twice").load()(4) == 8
    assert (package.parent / MARKER).exists()


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("hooked_package.missing:f", "it cannot be loaded: ModuleNotFoundError: No module named 'hooked_package.missi"),
        ("hooked_package.broken:f", "it cannot be loaded: ModuleNotFoundError: No module named 'not_installed_anywhe"),
        ("hooked_package.inner.rules:f", "it cannot be loaded: AttributeError: module 'hooked_package.inner.rules' h"),
        ("hooked_package.inner.rules:number", "it is not a function but of type int"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_one_line(package: Path, path: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        Hook("loss.advantage", path).load()
    assert str(error.value).startswith(f"loss.advantage = {path}: {told}")


def test_an_error_in_the_function_keeps_its_traceback_and_names_the_setting(package: Path) -> None:
    hook = Hook("loss.advantage", "hooked_package.inner.rules:twice")
    function = hook.load()
    with pytest.raises(TypeError) as error, hook.running():
        function()
    shown = "".join(traceback.format_exception(error.value))
    assert "TypeError: twice() missing 1 required positional argument" in shown
    assert "raised by the function of the setting loss.advantage = hooked_package.inner.rules:twice" in shown


def test_a_result_against_the_rule_names_the_setting_and_the_rule() -> None:
    error = Hook("loss.advantage", "a:b").error("it returned 3 numbers for 2 responses")
    assert str(error) == "loss.advantage = a:b: it returned 3 numbers for 2 responses"
    assert error.exit_status == 2
