"""A model folder with the demo's tokenizer and no weights, for commands whose sampling is replaced."""

import json
from pathlib import Path

from minpro_megatron.tiny_model import warm_start


def write_calculator_model(folder: Path) -> Path:
    """config.json and the tokenizer."""
    tokenizer = warm_start.build_tokenizer()
    folder.mkdir()
    tokenizer.save_pretrained(folder)
    facts = {"vocab_size": len(tokenizer), "eos_token_id": 1, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"} | facts))
    return folder
