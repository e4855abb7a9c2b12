"""Settings of runs to plan."""

from typing import Any

from minpro_megatron.config.run import RunConfig, parse_run_config


def run_to_plan(**sections: Any) -> RunConfig:
    """A small batch on Qwen3-30B-A3B, cut over 8 ranks, 4 servers of 2; sections are merged into its settings."""
    settings: dict[str, Any] = {
        "name": "planned",
        "model": {"hf_path": "Qwen/Qwen3-30B-A3B-Base", "megatron_path": "unused", "recompute": "full"},
        "data": {"train_file": "unused", "heldout_file": "unused"},
        "parallel": {"tensor": 2, "context": 2, "expert": 8, "data": 4},
        "batch": {"num_prompts": 16, "mini_batch_prompts": 4},
        "sampling": {"max_prompt_tokens": 1024, "max_response_tokens": 8192},
        "server": {"tensor_parallel": 2, "count": 4},
    }
    for name, section in sections.items():
        merges = isinstance(section, dict) and name in settings
        settings[name] = settings[name] | section if merges else section
    return parse_run_config(settings)
