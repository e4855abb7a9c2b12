"""Options of tools/replay_rollouts.py and a model folder for them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from minpro_megatron.replay.settings import ReplayOptions
from tests.support.replay_rows import GOOD, VOCABULARY, write_rows

OPTIONS = ReplayOptions(
    model=Path("model"),
    rollouts=Path("rows"),
    output=Path("out"),
    objective="minpro",
    settings=[],
    given={"device": "cpu"},
)
HF_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "vocab_size": VOCABULARY,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
}


@pytest.fixture
def options(tmp_path) -> ReplayOptions:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(HF_CONFIG))
    (model / "model.safetensors").touch()
    masked = {"group": "b", "loss_mask": [0, 0, 0]}
    rows = write_rows(tmp_path / "rows.jsonl", GOOD, GOOD | masked, GOOD | {"group": "c"})
    return replace(OPTIONS, model=model, rollouts=rows, output=tmp_path / "out")
