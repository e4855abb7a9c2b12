"""Recipes of a user's own folder `recipes`, beside those of this project."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minpro_megatron.errors import UserError
from minpro_megatron.launch.recipe import list_recipes, load_recipe

OWN = """
from recipes.shared import NAME
from minpro_megatron.recipes import demo

def run():
    "A run of my own."
    return demo.tiny_moe().model_copy(update={"name": NAME})
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder recipes/ in the current one, with mine.py. The root of the checkout is on the path, as after an
    editable installation, and its package `recipes` has been imported."""
    import recipes.demo  # noqa: F401

    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "shared.py").write_text("NAME = 'my-run'\n")
    (folder / "mine.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "recipes"}
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "recipes"]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.parametrize("is_package", [False, True])
def test_a_folder_recipes_is_found_before_that_of_the_project(
    own: Path, is_package: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if is_package:
        (own / "__init__.py").touch()
    assert load_recipe("recipes.mine:run").name == "my-run"
    assert load_recipe("recipes.demo:tiny_moe").name == "demo"  # what is not in it is the project's
    assert capsys.readouterr().err == ""


def test_a_module_that_both_have_is_the_users_and_a_line_names_the_other(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (own / "demo.py").write_text(OWN)
    assert load_recipe("recipes.demo:run").name == "my-run"
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"note: recipes.demo is {own / 'demo.py'}; this project's is minpro_megatron.recipes.demo"
    assert load_recipe("minpro_megatron.recipes.demo:tiny_moe").name == "demo"
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("own")
def test_the_list_has_both() -> None:
    lines = list_recipes("recipes")
    assert [line.split(None, 1) for line in lines if "mine" in line] == [["recipes.mine:run", "A run of my own."]]
    assert any(line.startswith("recipes.demo:tiny_moe ") for line in lines)


def test_an_unrelated_folder_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "soup.txt").touch()
    monkeypatch.chdir(tmp_path)
    assert load_recipe("recipes.demo:tiny_moe").name == "demo"


@pytest.mark.usefixtures("own")
def test_a_wrong_name_suggests_an_own_module() -> None:
    with pytest.raises(UserError, match=r"there is no module 'recipes.mime' \(did you mean recipes.mine"):
        load_recipe("recipes.mime:run")
