"""README and documentation agree with the repository: links, paths, make targets, commands and sizes of pages."""

import re
from pathlib import Path

import pytest

from minpro_megatron.config.library_settings import DICTIONARIES
from minpro_megatron.config.listing import fields_of
from minpro_megatron.config.run import RunConfig
from tests.support.documents import ROOT, anchors, links, pages, prose, shell_commands

PACKAGE = "minpro_megatron"
SETTINGS = {name for name, _ in fields_of(RunConfig)}
SECTIONS = {name.rpartition(".")[0] for name in SETTINGS if "." in name}
README_LINES, PAGE_LINES = 150, 300
TARGETS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def problems_of_links(page: Path) -> list[str]:
    """A line for each link of the page whose file or anchor does not exist, or that has no target in the repository."""
    found = []
    for link in links(page):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.is_relative_to(ROOT) or not target.exists():
            found.append(f"{link}: there is no such file")
        elif anchor and (target.suffix != ".md" or anchor not in anchors(target)):
            found.append(f"{link}: there is no such heading")
    return found


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    assert problems_of_links(page) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[a](other.md#one-two)", None),
        ("![a](other.md)", None),
        ("[a](#here)", None),
        ("[a](absent.md)", "no such file"),
        ("[a](other.md#two)", "no such heading"),
        ("[a](#two)", "no such heading"),
        ("[a](/etc/hostname)", "no such file"),
    ],
)
def test_the_link_check_finds_what_is_wrong(
    text: str, problem: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.unit.repository.test_documents.ROOT", tmp_path)
    (tmp_path / "other.md").write_text("# One: `two`\n\n```\n# Two\n```\n")
    page = tmp_path / "page.md"
    page.write_text(f"## Here\n\n{text}\n")
    found = problems_of_links(page)
    assert len(found) == (1 if problem else 0)
    assert problem is None or problem in found[0]


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, to_read = set(), [ROOT / "README.md"]
    while to_read:
        page = to_read.pop()
        reached.add(page)
        targets = {(page.parent / link.partition("#")[0]).resolve() for link in links(page) if "://" not in link}
        to_read += [target for target in targets if target.suffix == ".md" and target not in reached]
    assert set(pages()) <= reached


def test_pages_are_short() -> None:
    lengths = {page: page.read_text(encoding="utf-8").count("\n") for page in pages()}
    assert lengths.pop(ROOT / "README.md") <= README_LINES
    del lengths[ROOT / "CHANGELOG.md"]  # a list that grows, and that is not read as a whole
    assert {page.name: length for page, length in lengths.items() if length > PAGE_LINES} == {}


def test_every_make_target_they_name_exists() -> None:
    named = {target for page in pages() for target in re.findall(r"`make ([a-z][a-z-]*)", prose(page))}
    named |= {command.split()[1] for page in pages() for command in shell_commands(page) if command.startswith("make ")}
    assert {"demo", "test"} <= named <= TARGETS


def named_paths() -> list[tuple[str, str]]:
    """(page, path) of every file or folder that a page names between backquotes: from the root, or in the package."""
    tops = "|".join(path.name for base in (ROOT, ROOT / PACKAGE) for path in base.iterdir() if path.is_dir())
    pattern = re.compile(rf"`((?:{tops})/(?:[\w./*-]*\.\w+|[\w/]*/)?)`")
    found = {(page.name, path) for page in pages() for path in pattern.findall(page.read_text(encoding="utf-8"))}
    return sorted(found)


@pytest.mark.parametrize(("page", "path"), named_paths())
def test_every_path_they_name_exists(page: str, path: str) -> None:
    made_by_a_run = ("artifacts/", "runs/")
    assert path.startswith(made_by_a_run) or any(ROOT.glob(path)) or any((ROOT / PACKAGE).glob(path))


def named_settings(page: Path) -> set[str]:
    """The settings of a run that a page names between backquotes, as `section.key` or `section.key=value`. In tables
    that compare with other systems only the first column has names of this project."""
    text = prose(page)
    if page.name.startswith("coming_from"):
        text = re.sub(r"^(\|[^|]*\|).*$", r"\1", text, flags=re.MULTILINE)
    found = re.findall(r"`'?([a-z_]+(?:\.[a-z_0-9]+)+)(?:=[^`]*)?`", text)
    files = (".py", ".toml", ".json", ".jsonl")
    return {name for name in found if name.partition(".")[0] in SECTIONS and Path(name).suffix not in files}


def test_every_setting_they_name_exists() -> None:
    named = {name: page.name for page in pages() for name in named_settings(page)}
    assert len(named) > 60
    unknown = {name: page for name, page in named.items() if name not in SETTINGS | SECTIONS}
    # the entries of these dictionaries are names of other libraries
    assert {name: page for name, page in unknown.items() if name.rpartition(".")[0] not in DICTIONARIES} == {}


def test_the_tests_that_the_table_of_damage_names_exist() -> None:
    text = (ROOT / "docs" / "damage_and_attacks.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b(\w+\.py)\b", text))
    assert len(named) > 20
    assert named <= {path.name for path in (ROOT / "tests").rglob("*.py")}


def test_the_readme_has_the_figures_of_the_records() -> None:
    def found(record: str, pattern: str) -> tuple[str, ...]:
        match = re.search(pattern, (ROOT / record).read_text(encoding="utf-8"))
        assert match is not None, record
        return match.groups()

    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    cases, loss, tensor = found(
        "tests/mesh/matrix_result.md", r"(\d+) of \1 cases\. Largest differences: loss (\S+),.*gradient tensor (\S+),"
    )
    assert f"{cases} cases" in readme
    assert f"loss within {loss} and every gradient tensor within {tensor}" in readme
    tried, cases, equal = found("tests/e2e/crash_matrix_result.md", r"(\d+) of (\d+) cases: (\d+) equal,")
    assert f"{tried} of {cases} cases" in readme
    assert f"{equal} equal an undisturbed run bit for bit" in readme
    (error,) = found("benchmarks/plan_run.md", r"Mean error (\d+) %")
    assert f"by {error} % on average" in readme
