"""The reference engine computes what transformers computes, for every family."""

from pathlib import Path

import pytest
import torch

from minpro_megatron.models.architecture import read_architecture
from minpro_megatron.reference_engine.model import KeyValueCache, Model
from tests.mesh.reference import FAMILIES, make_model
from tests.support.reference_models import one_thread

TOKENS = 40


@torch.inference_mode()
@one_thread()
@pytest.mark.parametrize("kind", ["moe", "dense", "tied", *FAMILIES])
def test_logits_of_every_token_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    theirs = make_model(kind)
    theirs.save_pretrained(tmp_path)
    architecture = read_architecture(tmp_path)
    ours, cache = Model.from_hf(architecture, str(tmp_path), TOKENS), KeyValueCache(architecture, TOKENS)
    ids = torch.randint(0, architecture.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(0))
    expected = theirs(ids[None]).logits[0]
    found = torch.stack([ours.logits(ours.step(token, cache)) for token in ids.tolist()])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert expected.abs().max() > 1
