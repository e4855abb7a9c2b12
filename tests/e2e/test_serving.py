"""A server of each engine on the CPU, a real SGLang too: started, asked, given new weights, stopped."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from minpro_megatron.config.run import RunConfig
from minpro_megatron.serving.answers import SampledSequence
from minpro_megatron.serving.calls import for_all
from minpro_megatron.serving.client import SamplingParameters, ServerClient
from minpro_megatron.serving.control import ControlError, ServerControl
from minpro_megatron.serving.errors import WrongPolicyVersion
from minpro_megatron.serving.model_files import read_model_facts
from minpro_megatron.serving.server_process import ServerProcess, stop_servers

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU engine's stand-ins are not for GPU machines"),
]

PROMPTS = [[5, 6, 7], [20, 21, 22, 23, 24, 25], [9]]
MAX_RESPONSE_TOKENS = 12
# Of SGLang: HTTP, scheduler, detokenizer.
NUM_PROCESSES = {"reference": 1, "sglang": 3}


def save_random_model(folder: Path, seed: int) -> None:
    """A tiny Qwen3-MoE with logits spread widely enough for responses to differ in length."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
        norm_topk_prob=True, max_position_embeddings=128, tie_word_embeddings=False, eos_token_id=1,
        pad_token_id=0, dtype=torch.float32,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(5.0)
    model.save_pretrained(folder)


def log_probs_by_transformers(folder: Path, prompt: list[int], response: np.ndarray, temperature: float) -> np.ndarray:
    from transformers import Qwen3MoeForCausalLM

    model = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = torch.tensor([prompt + response.tolist()])
    with torch.no_grad():
        logits = model(tokens).logits[0, len(prompt) - 1 : -1].double()
    chosen = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(response.tolist()).unsqueeze(1))
    return chosen[:, 0].numpy()


@dataclass
class Running:
    config: RunConfig
    server: ServerProcess
    folder: Path
    other_folder: Path

    def generate(
        self, version: int, *, temperature: float = 1.0, timeout_s: float = 30.0
    ) -> list[list[SampledSequence]]:
        async def main() -> list[list[SampledSequence]]:
            facts = read_model_facts(str(self.folder))
            sampling = SamplingParameters(temperature, MAX_RESPONSE_TOKENS)
            async with ServerClient(self.server.address, facts, timeout_s) as client:
                assert await client.policy_version() == version
                return await asyncio.gather(
                    *(client.generate(prompt, list(range(8)), sampling, version) for prompt in PROMPTS)
                )

        return asyncio.run(main())

    def largest_difference(self, folder: Path, sampled: list[list[SampledSequence]], temperature: float = 1.0) -> float:
        return max(
            float(np.abs(log_probs_by_transformers(folder, prompt, s.token_ids, temperature) - s.log_probs).max())
            for prompt, sequences in zip(PROMPTS, sampled, strict=True)
            for s in sequences[:3]
        )


@pytest.fixture(scope="module", params=NUM_PROCESSES)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("serving")
    folder, other_folder = root / "hf", root / "other"
    save_random_model(folder, seed=0)
    save_random_model(other_folder, seed=1)
    config = RunConfig.model_validate(
        {
            "name": "serving",
            "runs_dir": str(root / "runs"),
            "device": "cpu",
            "model": {"hf_path": str(folder), "megatron_path": "unused", "dtype": "float32"},
            "data": {"train_file": "unused", "heldout_file": "unused"},
            "sampling": {"max_prompt_tokens": 8, "max_response_tokens": MAX_RESPONSE_TOKENS},
            "server": {
                "engine": request.param,
                "device": "cpu",
                "dtype": "float32",
                "max_total_tokens": 4096,
                "start_timeout_s": 150,
            },
        }
    )
    server = ServerProcess(config, 0)
    server.start()
    try:
        assert server.wait_until_ready(config.server.start_timeout_s)
        yield Running(config, server, folder, other_folder)
    finally:
        stop_servers([server])


def test_log_probs_are_those_of_transformers(running: Running) -> None:
    for temperature in (1.0, 0.7):
        sampled = running.generate(version=0, temperature=temperature)
        assert running.largest_difference(running.folder, sampled, temperature) < 1e-4
        lengths = {len(sequence.token_ids) for sequences in sampled for sequence in sequences}
        assert max(lengths) == MAX_RESPONSE_TOKENS  # not cut short by the server's context length
        different = {tuple(sequence.token_ids) for sequence in sampled[0]}
        assert len(different) > 1


def test_new_weights_are_used_and_their_version_is_reported(running: Running) -> None:
    control = ServerControl(running.server.address, timeout_s=30, vocabulary_size=64)
    before = control.weights_checksum()
    for_all([control], "pause_generation", mode="retract")
    with pytest.raises(ControlError, match=r"server 0 at .*update_weights_from_disk: status 400"):
        control.update_weights_from_disk(model_path=str(running.folder / "none"), weight_version=1)
    for_all([control], "update_weights_from_disk", model_path=str(running.other_folder), weight_version=1)
    for_all([control], "flush_cache")
    for_all([control], "continue_generation")
    assert control.weights_checksum().engine != before.engine
    assert control.policy_version() == 1
    greedy = control.generate_greedy(PROMPTS[0], 6)
    expected = log_probs_by_transformers(running.other_folder, PROMPTS[0], np.asarray(greedy.token_ids), 1.0)
    assert np.abs(expected - np.asarray(greedy.log_probs)).max() < 1e-4

    sampled = running.generate(version=1)
    assert running.largest_difference(running.other_folder, sampled) < 1e-4
    with pytest.raises(WrongPolicyVersion, match=r"sampled with version \[1\] instead of 2"):
        asyncio.run(_generate_as_version_2(running))
    control.update_weights_from_disk(model_path=str(running.folder), weight_version=0)
    assert control.weights_checksum() == before
    control.close()


async def _generate_as_version_2(running: Running) -> None:
    sampling = SamplingParameters(1.0, MAX_RESPONSE_TOKENS)
    async with ServerClient(running.server.address, read_model_facts(str(running.folder)), 30) as client:
        await client.generate(PROMPTS[0], [1], sampling, policy_version=2)


def test_it_stops_with_all_its_processes(running: Running) -> None:
    """The last test: it ends the server."""
    assert running.server._process is not None
    process = psutil.Process(running.server._process.pid)
    members = [process, *process.children(recursive=True)]
    assert len(members) >= NUM_PROCESSES[running.config.server.engine]
    begin = time.monotonic()
    stop_servers([running.server])
    assert time.monotonic() - begin < 10
    assert not any(member.is_running() and member.status() != psutil.STATUS_ZOMBIE for member in members)
