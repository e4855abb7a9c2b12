"""The wheels that a GPU machine needs are pinned, and the documentation lists them."""

import re

import pytest

from environment.gpu_check_wheels import PACKAGES, requirements
from minpro_megatron.gpu_checks.machine import NEEDED
from tests.support.documents import ROOT

CONSTRAINTS = (ROOT / "environment" / "constraints.txt").read_text(encoding="utf-8")


def test_the_versions_are_the_pinned_ones() -> None:
    pinned = requirements(CONSTRAINTS)
    assert len(pinned) == len(PACKAGES)
    assert set(pinned) <= set(CONSTRAINTS.splitlines())
    with pytest.raises(KeyError):
        requirements("torch==2.14.1\n")


def test_the_page_lists_them() -> None:
    page = (ROOT / "docs" / "gpu_checks.md").read_text(encoding="utf-8")
    listed = {f"{name}=={version}" for name, version in re.findall(r"\| ([\w-]+) (\d[\w.]*) \| \d", page)}
    assert listed == set(requirements(CONSTRAINTS))


def test_what_is_examined_before_the_checks_is_carried_along_or_torch() -> None:
    names = {"megatron-core" if name == "megatron.core" else name for name in NEEDED} - {"torch"}
    assert names <= set(PACKAGES)
