"""The import order: one direction, so that a folder can be read knowing only what stands before it.

It holds between the folders of the package, inside them (no two files import each other, however indirectly), and for
cluster/, tools/, recipes/ and benchmarks/.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.support.imports_of_files import PACKAGE, ROOT, imported_names

# Folders (and files) of the package. Each may import those of earlier lines, and itself.
ORDER = [
    ["terminal_text", "missing_packages", "command_line"],
    ["errors", "records", "pipe_messages"],
    ["hooks"],
    ["files", "config"],
    ["run_folder"],
    ["metrics"],
    ["monitor"],
    ["objective"],
    ["models"],
    ["batching"],
    ["serving"],
    ["rewards"],
    ["prompts"],
    ["environments"],
    ["prompt_sets"],
    ["buffer"],
    ["feed", "fleet"],
    ["evaluation"],
    ["collector"],
    ["parallel"],
    ["weights", "host_memory"],
    ["checkpoints"],
    ["conversion", "publishing"],
    ["reference_engine"],
    ["actor"],
    ["planning"],
    ["report"],
    ["train"],
    ["roles"],
    ["launch"],
    ["replay"],
    ["rehearsal"],
    ["gpu_checks"],
    ["model_comparison", "tiny_model"],
    ["commands"],
    ["__main__"],
]
# Folders with rooms of their own, which hold to the same rule.
ROOMS = {"objective": ["across_ranks", "formulas", "loss_functions"]}
# The folders beside the package, and which of each other they may import; all of them may import the package.
BESIDE = {"recipes": [], "cluster": [], "tools": [], "benchmarks": ["recipes", "cluster", "tools", "tests"]}
# The folders beside the package that are also part of it, by a link: their modules import each other by the name that
# they have in an installed package.
LINKED = ["recipes", "cluster"]
# Third-party modules that only some folders may import.
ONLY_IN = {
    "megatron.core.parallel_state": ["parallel"],
    "megatron": ["parallel", "weights", "host_memory", "checkpoints", "actor", "rehearsal", "gpu_checks"],
}
NO_TORCH = [
    "terminal_text",
    "command_line",
    "errors",
    "records",
    "hooks",
    "run_folder",
    "files",
    "config",
    "metrics",
    "models",
    "serving",
    "rewards",
    "prompts",
    "prompt_sets",
    "buffer",
    "feed",
    "fleet",
    "evaluation",
    "collector",
    "planning",
    "report",
    "launch",
    "__main__",
]
# What parses its arguments before it imports torch, in the functions that need it.
LATE_TORCH = ["commands"]
# What a command imports only after it has parsed its arguments, so that its help is shown at once: each of these takes
# between a tenth of a second and two seconds.
LATE_IN_COMMANDS = ("aiohttp", "jinja2", "matplotlib", "pyarrow", "requests", "safetensors", "sympy", "transformers")
# Of folders that do import torch, the files that a submitting machine, the launcher or the collector reads.
FILES_WITHOUT_TORCH = [
    f"{PACKAGE}.{name}"
    for name in (
        "checkpoints.checkpoint_folder",
        "checkpoints.manifest",
        "checkpoints.resume_point",
        "checkpoints.run_checkpoint",
        "checkpoints.save_schedule",
        "roles.collect",
        "roles.serve",
    )
]
# What a recipe may import of the package: job images and submitting machines need nothing else.
RECIPES_IMPORT = (f"{PACKAGE}.config", f"{PACKAGE}.recipes")


def is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def part_of(path: Path, package: Path) -> str:
    """The folder of the package that a file belongs to; for a file directly in it, the file's own name."""
    return path.relative_to(package).with_suffix("").parts[0]


def breaches(package: Path, order: list[list[str]]) -> Iterator[str]:
    """A line for every import against the order, and for everything that the order does not name."""
    place = {name: index for index, line in enumerate(order) for name in line}
    for path in sorted(package.rglob("*.py")):
        own = part_of(path, package)
        if own == "__init__":
            continue
        if own not in place:
            yield f"{own} has no place in the import order"
            continue
        for name in sorted(imported_names(path)):
            if not is_within(name, package.name) or name == package.name:
                continue
            other = name.split(".")[1]
            if other == "__version__":  # of the package itself
                continue
            if other != own and place.get(other, len(order)) >= place[own]:
                yield f"{path.relative_to(package.parent)} must not import {name}"


def modules_of(folder: Path) -> dict[str, Path]:
    """The modules in the folder by their dotted names."""
    files = sorted(path for path in folder.rglob("*.py") if path.name != "__init__.py")
    return {".".join(path.relative_to(folder.parent).with_suffix("").parts): path for path in files}


def cycle_in(modules: Mapping[str, Path]) -> list[str]:
    """The modules that are in an import cycle, or import one that is; empty if there is none."""
    left = {
        name: {other for other in map(own_name, imported_names(path)) if other in modules and other != name}
        for name, path in modules.items()
    }
    while ready := [name for name, others in left.items() if not others & left.keys()]:
        for name in ready:
            del left[name]
    return sorted(left)


def own_name(name: str) -> str:
    """The name in the checkout of a module that is imported by its name in the package: cluster.paths."""
    inside = name.removeprefix(f"{PACKAGE}.")
    return inside if inside.partition(".")[0] in LINKED else name


def importers(parts: Iterable[str], module: str) -> list[str]:
    """The files of these parts of the package that import `module` or something in it."""
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / PACKAGE).rglob("*.py"))
        if part_of(path, ROOT / PACKAGE) in parts
        for name in sorted(imported_names(path))
        if is_within(name, module)
    ]


def test_imports_go_one_way():
    assert list(breaches(ROOT / PACKAGE, ORDER)) == []


@pytest.mark.parametrize("folder", ROOMS)
def test_the_rooms_of_a_folder_import_one_way(folder):
    rooms = ROOMS[folder]
    assert {path.parent.name for path in (ROOT / PACKAGE / folder).glob("*/*.py")} == set(rooms)
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for number, room in enumerate(rooms)
        for path in sorted((ROOT / PACKAGE / folder / room).glob("*.py"))
        for name in sorted(imported_names(path))
        if any(is_within(name, f"{PACKAGE}.{folder}.{later}") for later in rooms[number + 1 :])
    ]
    assert found == []


@pytest.mark.parametrize("folder", [PACKAGE, *BESIDE])
def test_no_file_imports_itself_through_others(folder):
    assert cycle_in(modules_of(ROOT / folder)) == []


@pytest.mark.parametrize("folder", BESIDE)
def test_the_folders_beside_the_package_are_independent(folder):
    refused = {"tests", *BESIDE} - {folder, *BESIDE[folder]}
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules_of(ROOT / folder).values()
        for name in sorted(imported_names(path))
        if own_name(name).split(".")[0] in refused
    ]
    assert found == []


def test_the_package_imports_nothing_beside_it():
    names = ["tests", *BESIDE, *(f"{PACKAGE}.{folder}" for folder in LINKED)]
    assert [line for name in names for line in importers(_parts(), name)] == []


@pytest.mark.parametrize("folder", LINKED)
def test_the_linked_folders_are_those_of_the_checkout(folder):
    assert (ROOT / PACKAGE / folder).samefile(ROOT / folder)


def test_the_linked_folders_are_imported_by_one_name():
    """By the other one a module is loaded a second time, and its classes are other classes (docs/decisions.md)."""
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for folder in (PACKAGE, *BESIDE, "tests", "docs")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path != ROOT / "tests" / "unit" / "launch" / "test_own_recipes.py"  # a user's own folder of this name
        for name in sorted(imported_names(path))
        if name.partition(".")[0] in LINKED
    ]
    assert found == []


@pytest.mark.parametrize("module", ONLY_IN)
def test_megatron_is_read_only_where_it_is_known(module):
    assert importers(_parts() - set(ONLY_IN[module]), module) == []


def test_what_needs_no_torch_imports_none():
    assert importers(NO_TORCH, "torch") == []


def imported_at_start(starts: Iterable[str]) -> dict[str, set[str]]:
    """By module of the package that is imported when these are, through whatever other files: all that it imports."""
    modules = modules_of(ROOT / PACKAGE)
    found: dict[str, set[str]] = {}
    waiting = list(starts)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = imported_names(modules[name], lazily=False)
            waiting += [one for one in found[name] if one in modules]
    return found


def importing(found: Mapping[str, set[str]], modules: Iterable[str]) -> list[str]:
    return [
        f"{name} imports {one}"
        for name, others in found.items()
        for one in sorted(others)
        if any(is_within(one, module) for module in modules)
    ]


def test_what_runs_without_torch_imports_nothing_that_needs_it():
    starts = [name for name in modules_of(ROOT / PACKAGE) if name.split(".")[1] in [*NO_TORCH, *LATE_TORCH]]
    assert importing(imported_at_start([*starts, *FILES_WITHOUT_TORCH]), ("torch", "megatron")) == []


def test_the_help_of_a_command_imports_nothing_that_is_slow():
    starts = [name for name in modules_of(ROOT / PACKAGE) if name.split(".")[1] == "commands"]
    assert importing(imported_at_start(starts), LATE_IN_COMMANDS) == []


def test_recipes_import_only_settings():
    for path in sorted((ROOT / "recipes").rglob("*.py")):
        ours = [name for name in imported_names(path) if is_within(name, PACKAGE)]
        assert [name for name in ours if not any(is_within(name, one) for one in RECIPES_IMPORT)] == [], path


def test_the_documents_list_the_folders_in_this_order():
    text = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    listed = re.findall(r"^  (\w+)(?:/|\.py) ", text, flags=re.MULTILINE)
    place = {name: index for index, line in enumerate(ORDER) for name in line}
    assert sorted(listed) == sorted(place)
    assert [place[name] for name in listed] == sorted(place.values())


def test_package_files_hold_nothing_but_version_and_python_interface():
    filled = {path for path in (ROOT / PACKAGE).rglob("__init__.py") if path.read_text().strip()}
    assert filled == {ROOT / PACKAGE / "__init__.py", ROOT / PACKAGE / "objective" / "__init__.py"}


def _parts() -> set[str]:
    return {name for line in ORDER for name in line}


@pytest.mark.parametrize(
    ("source", "breach"),
    [
        ("from here.low import x", None),
        ("import here.high.thing", None),
        ("from here.top import x", "must not import here.top"),
        ("import os, here.top", "must not import here.top"),
        ("def f():\n    from here import top", "must not import here.top"),
        ("from here.elsewhere import x", "must not import here.elsewhere"),
    ],
)
def test_the_check_itself_finds_breaches(tmp_path, source, breach):
    package = tmp_path / "here"
    (package / "high").mkdir(parents=True)
    (package / "high" / "file.py").write_text(source)
    found = list(breaches(package, [["low"], ["high"], ["top"]]))
    assert bool(found) == bool(breach)
    assert all(breach and breach in line for line in found)
    (package / "new.py").touch()
    assert "new has no place in the import order" in list(breaches(package, [["low"], ["high"], ["top"]]))


def test_the_check_itself_finds_cycles(tmp_path):
    folder = tmp_path / "here"
    folder.mkdir()
    sources = {
        "a": "import here.b",
        "b": "def f():\n    from here import c",
        "c": "import here.a",
        "d": "import here.e",
    }
    for name, source in (sources | {"e": ""}).items():
        (folder / f"{name}.py").write_text(source)
    assert cycle_in(modules_of(folder)) == ["here.a", "here.b", "here.c"]
