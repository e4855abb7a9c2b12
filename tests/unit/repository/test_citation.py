"""CITATION.cff names the software in its current version, and the papers whose methods it implements."""

import re
from pathlib import Path

import yaml

from minpro_megatron import __version__

ROOT = Path(__file__).resolve().parents[3]


def test_the_citation_is_of_this_version_and_of_the_papers_of_the_readme() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (cited["cff-version"], cited["version"], cited["license"]) == ("1.2.0", __version__, "Apache-2.0")
    papers = {entry["identifiers"][0]["value"]: entry["title"] for entry in cited["references"]}
    citation = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Citation")[2]
    text = " ".join(citation.split())
    assert set(re.findall(r"\[(arXiv:[\d.]+)\]", citation)) == set(papers)
    for entry in cited["references"]:
        assert f"*{entry['title']}.*" in text
        assert ", ".join(f"{one['given-names']} {one['family-names']}" for one in entry["authors"]) in text
