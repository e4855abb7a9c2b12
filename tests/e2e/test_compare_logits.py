"""tools/compare_logits.py compares what it says, and refuses what it cannot."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.conftest import TinyModel, with_weights
from tests.mesh.reference import make_model

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(400)]

TEXTS = ("12+34=46", "7*8=56", "99-1=")
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
    assert (done.returncode, done.stderr) == (2, "error: token 99999: the model's tokens are 0 to 76\n")


def test_a_converted_model_agrees_and_one_of_other_weights_does_not(tiny_model: TinyModel, tmp_path: Path) -> None:
    same = _compare(tiny_model.hf, tiny_model.megatron)
    assert same["top_1_agreement"] == 1
    assert 0 < same["mean_difference"] < same["largest_difference"] < 1e-5
    assert 0 <= same["mean_kl"] <= same["largest_kl"] < 1e-8

    tensors = load_file(tiny_model.hf / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"] *= 10
    other = with_weights(tiny_model, tensors, tmp_path)
    found = _compare(tiny_model.hf, other.megatron, status=1)
    expected = _expected(tiny_model.hf, other.hf)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    assert found["largest_difference"] > 1000 * same["largest_difference"]
    assert found["mean_kl"] > 1e-3
    assert 0 < found["top_1_agreement"] < 0.9


def _compare(hf: Path, megatron: Path, status: int = 0) -> dict[str, float]:
    texts = [option for text in TEXTS for option in ("--text", text)]
    done = _run("--hf", str(hf), "--megatron", str(megatron), "--parallel", "tensor=2", *texts, "--json")
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout)


@torch.no_grad()
def _expected(hf: Path, other: Path) -> dict[str, float]:
    """The comparison of two models by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(hf)
    ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in TEXTS]
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (hf, other)]
    one, two = (torch.cat([model(sequence).logits[0] for sequence in ids]).double() for model in models)
    p, q = one.softmax(-1), two.softmax(-1)
    divergence = (p * (p / q).log()).sum(-1)
    return {
        "tokens": len(one),
        "largest_difference": float((one - two).abs().max()),
        "mean_difference": float((one - two).abs().mean()),
        "top_1_agreement": float((one.argmax(-1) == two.argmax(-1)).double().mean()),
        "mean_kl": float(divergence.mean()),
        "largest_kl": float(divergence.max()),
    }
