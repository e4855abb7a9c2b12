"""Rows of stored rollouts as files."""

import json
from pathlib import Path
from typing import Any

VOCABULARY = 77
GOOD: dict[str, Any] = {
    "group": "a",
    "prompt_ids": [1, 2],
    "response_ids": [3, 76, 0],
    "behavior_log_probs": [-1.5, -2, 0],
    "reward": 1,
    "loss_mask": [1, 0, 1],
    "rollout_log_probs": "not read unless needed",
    "prompt": "anything",
}


def write_rows(path: Path, *lines: Any) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path
