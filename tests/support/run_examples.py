"""A small valid run, for tests of what is around it."""

import json
from datetime import UTC, datetime
from pathlib import Path

from minpro_megatron.checkpoints.checkpoint_folder import CheckpointFolder
from minpro_megatron.checkpoints.file_records import record_file
from minpro_megatron.checkpoints.manifest import FileRecord, ModelManifest, RunIdentity, RunManifest, write_manifest
from minpro_megatron.checkpoints.resume_point import CHECKPOINTS
from minpro_megatron.config.batch import BatchConfig
from minpro_megatron.config.checkpoint import CheckpointConfig
from minpro_megatron.config.data import DataConfig
from minpro_megatron.config.evaluation import EvaluationConfig
from minpro_megatron.config.model import ModelConfig
from minpro_megatron.config.run import RunConfig
from minpro_megatron.config.sampling import SamplingConfig
from minpro_megatron.config.server import ServerConfig
from minpro_megatron.models.architecture import read_architecture

HF_CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "vocab_size": 32,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "eos_token_id": 1,
}
# Every character is the unknown token: as short as a tokenizer can be.
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "[\\s\\S]"}, "behavior": "Isolated", "invert": False},
    "model": {"type": "WordLevel", "vocab": {"?": 0}, "unk_token": "?"},
}
PROMPT = '{"id": "1", "source": "test", "prompt": "1+1=", "answer": "2"}\n'


def example_config(folder: Path, **changes: object) -> RunConfig:
    """A CPU run whose files are under `folder` (see `write_example_files`), with `changes` to its settings."""
    settings = {
        "name": "example",
        "runs_dir": str(folder / "runs"),
        "num_global_steps": 4,
        "device": "cpu",
        "model": ModelConfig(hf_path=str(folder / "hf"), megatron_path=str(folder / "megatron"), dtype="float32"),
        "data": DataConfig(train_file=str(folder / "train.jsonl"), heldout_file=str(folder / "heldout.jsonl")),
        "batch": BatchConfig(num_prompts=4, mini_batch_prompts=2, max_tokens_per_row=64),
        "sampling": SamplingConfig(max_prompt_tokens=16, max_response_tokens=8),
        "server": ServerConfig(device="cpu", dtype="float32"),
        "evaluation": EvaluationConfig(num_prompts=1),
    }
    return RunConfig.model_validate(settings | changes)


def write_example_files(folder: Path) -> None:
    """What preflight looks for: a model in both forms and the data."""
    for name in ("hf/config.json", "hf/tokenizer.json", "hf/model.safetensors", "megatron/weights.distcp"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "hf/config.json").write_text(json.dumps(HF_CONFIG))
    (folder / "hf/tokenizer.json").write_text(json.dumps(TOKENIZER))
    files = {"weights.distcp": record_file(folder / "megatron" / "weights.distcp")}
    write_manifest(
        folder / "megatron",
        ModelManifest(source="hf", dtype="float32", architecture=read_architecture(folder / "hf"), files=files),
    )
    (folder / "train.jsonl").write_text(PROMPT)
    (folder / "heldout.jsonl").write_text(PROMPT.replace("1+1=", "2*1="))


def save_checkpoint(config: RunConfig, version: int, num_global_steps: int | None = None) -> None:
    """A complete checkpoint of the run after that global step, with bytes of no meaning for weights."""
    folder = CheckpointFolder(config.run_dir / CHECKPOINTS, CheckpointConfig(keep_last=5))
    partial = folder.new_partial(version)
    (partial / "weights").write_bytes(b"abc")
    identity = RunIdentity(seed=0, objective="minpro", dtype="float32", parallel={}, architecture={})
    manifest = RunManifest(
        policy_version=version, updates=2 * version, num_global_steps=num_global_steps, run=identity,
        created=datetime(2026, 1, 1, tzinfo=UTC),
        files={"weights": FileRecord(bytes=3, sha256="")},
    )  # fmt: skip
    folder.publish(partial, manifest)
