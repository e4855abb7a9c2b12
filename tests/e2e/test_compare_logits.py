"""tools/compare_logits.py compares what it says, and refuses what it cannot."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mesh.reference import make_model

pytestmark = [pytest.mark.e2e, pytest.mark.long]

TOOL = Path(__file__).parents[2] / "tools" / "compare_logits.py"


def _run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *options], capture_output=True, text=True, timeout=150)


def test_a_model_on_two_ranks_agrees_with_transformers(tmp_path: Path) -> None:
    make_model("dense").save_pretrained(tmp_path / "hf")
    done = _run("--hf", str(tmp_path / "hf"), "--parallel", "tensor=2", "--ids", "1,2,3,4,5", "--ids", "7,6", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["tokens"], found["top_1_agreement"]) == (7, 1.0)
    assert 0 < found["mean_difference"] < found["largest_difference"] < 1e-4
    assert 0 <= found["largest_kl"] < 1e-8


def test_tokens_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    make_model("dense").save_pretrained(tmp_path / "hf")
    done = _run("--hf", str(tmp_path / "hf"), "--ids", "1,99999")
    assert (done.returncode, done.stderr) == (2, "compare_logits: token 99999: the model's tokens are 0 to 76\n")
