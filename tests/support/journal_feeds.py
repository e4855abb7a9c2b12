"""The feed of a stored run."""

import json
from pathlib import Path
from typing import Any

from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.feed.journal_feed import JournalFeed
from tests.support.rollout_fakes import run_config

NUM_STEPS = 3


def config_for(folder: Path, *overrides: str, vocabulary: int = 24) -> RunConfig:
    """A run that trains on the journal in `folder`/stored."""
    (folder / "model").mkdir(exist_ok=True)
    facts = {"vocab_size": vocabulary, "eos_token_id": 0, "max_position_embeddings": 64}
    (folder / "model" / "config.json").write_text(json.dumps(facts))
    settings = [f"debug.journal={folder / 'stored'}", f"model.hf_path={folder / 'model'}"]
    return with_overrides(run_config(folder / "runs", steps=NUM_STEPS), [*settings, *overrides])


def make_feed(folder: Path, *overrides: str, **model: Any) -> JournalFeed:
    return JournalFeed(config_for(folder, *overrides, **model), lambda ids: f"text of {ids.tolist()}")
