"""A model of every family is published to a real SGLang server, which then gives the trainer's log-probs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from minpro_megatron.config.run import RunConfig
from minpro_megatron.serving.control import ServerControl
from minpro_megatron.serving.server_process import ServerProcess, stop_servers
from tests.e2e.publishing import Step, Trainer
from tests.mesh.reference import GLM, LLAMA3, YARN, biases_of_choice, random_values

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.long,
    pytest.mark.timeout(900),  # against hanging only: other processes may have the processors
    pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU engine's stand-ins are not for GPU machines"),
]

MAX_DIFFERENCE = 1e-4  # of a log-prob, between engine and trainer
# sizes that SGLang's CPU kernels take
COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "dtype": torch.float32,
}
TIED: dict[str, Any] = COMMON | {"tie_word_embeddings": True}
FAMILIES: dict[str, PreTrainedConfig] = {
    "qwen2": Qwen2Config(**COMMON),
    "llama": LlamaConfig(**TIED, rope_parameters=LLAMA3),
    "yarn": Qwen3Config(**COMMON, head_dim=16, rope_parameters=YARN),
    "glm": Glm4MoeConfig(
        **{
            **GLM,
            **COMMON,
            "head_dim": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        }
    ),
}


def run_config(folder: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "publish",
            "runs_dir": str(folder.parent / "runs"),
            "device": "cpu",
            "model": {"hf_path": str(folder), "megatron_path": "unused", "dtype": "float32"},
            "data": {"train_file": "unused", "heldout_file": "unused"},
            "parallel": {"tensor": 2},
            "sampling": {"temperature": 0.7, "max_prompt_tokens": 8, "max_response_tokens": 200},
            "batch": {"max_tokens_per_row": 256},
            "server": {
                "engine": "sglang",
                "device": "cpu",
                "dtype": "float32",
                "max_total_tokens": 4096,
                "start_timeout_s": 300,
            },
            "publish": {"bucket_bytes": 8000, "timeout_s": 60},
        }
    )


def save_random(config: PreTrainedConfig, folder: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in (*model.named_parameters(), *biases_of_choice(model)):
            parameter.copy_(random_values(name, parameter))
    model.save_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_server_holds_the_published_weights_and_scores_as_the_trainer(family: str, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    save_random(FAMILIES[family], folder)
    config = run_config(folder)
    server, trainer = ServerProcess(config, 0), Trainer(config, folder, tmp_path, deadline_s=800.0)
    try:
        server.start()
        trainer.start()
        assert server.wait_until_ready(300)
        control, before = ServerControl(server.address, timeout_s=60), ""
        for version in (1, 2):
            report = trainer.publish(Step(version, [server.address]), timeout_s=400.0)
            assert (report.held_by, report.failures) == ([0], {})
            assert (control.policy_version(), control.weights_checksum().engine) == (version, report.checksum)
            assert report.checksum != before
            assert 0 < report.canaries[0].max < MAX_DIFFERENCE
            before = report.checksum
    finally:
        trainer.end()
        stop_servers([server])
