"""The reference engine against transformers, and as a process: weights by broadcast, pauses, a client that leaves."""

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import numpy as np
import psutil
import pytest
import requests
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from minpro_megatron.config.run import RunConfig
from minpro_megatron.models.architecture import read_architecture
from minpro_megatron.publishing.update_group import join_update_group
from minpro_megatron.reference_engine.model import KeyValueCache, Model
from minpro_megatron.reference_engine.sampling import Sampler, SamplingParameters
from minpro_megatron.serving.api_key import api_key, authorization, make_api_key
from minpro_megatron.serving.calls import start_for_all
from minpro_megatron.serving.control import ControlError, ServerControl
from minpro_megatron.serving.server_process import ServerProcess, stop_servers
from tests.e2e.random_models import log_probs_by_transformers, save_random_model

pytestmark = pytest.mark.e2e

PROMPT = [5, 6, 7]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["dense", "mixture", "mixture_unnormalized"])
def test_log_probs_and_routes_are_those_of_transformers(tmp_path: Path, kind: str, tied: bool) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    shared = {
        "vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}, "eos_token_id": 1, "dtype": torch.float32,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "dense":
        model = Qwen3ForCausalLM(Qwen3Config(**shared))
    else:
        experts = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(norm_topk_prob=kind == "mixture", **experts, **shared))
    with torch.no_grad():
        for parameter in model.parameters():  # norms too
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval().save_pretrained(tmp_path)

    architecture = read_architecture(tmp_path)
    sampler = Sampler(SamplingParameters(temperature=0.8, sampling_seed=4))
    tokens, log_probs, cache = [3], [], KeyValueCache(architecture, 120)
    with torch.inference_mode():
        engine = Model.from_hf(architecture, str(tmp_path), 120)
        while len(log_probs) < 100:
            token, log_prob = sampler(engine.logits(engine.step(tokens[-1], cache)))
            tokens.append(token)
            log_probs.append(log_prob)
        output = model(torch.tensor([tokens[:-1]]), **({} if kind == "dense" else {"output_router_logits": True}))
    expected = (output.logits[0] / 0.8).log_softmax(-1)[range(100), tokens[1:]]
    assert (expected - torch.tensor(log_probs)).abs().max() < 1e-5
    assert len(set(tokens)) > 30
    if kind == "dense":
        assert cache.routes_K == []
    else:
        routes = torch.stack(cache.routes_K).view(100, 3, 3)
        chosen = torch.stack([logits.topk(3).indices for logits in output.router_logits], 1)
        assert torch.equal(routes.sort().values, chosen.sort().values)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of the same sizes."""
    root = tmp_path_factory.mktemp("reference_engine")
    for seed in (0, 1):
        save_random_model(root / str(seed), seed)
    return [root / "0", root / "1"]


@pytest.fixture(scope="module")
def server(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    config = RunConfig.model_validate(
        {
            "name": "reference",
            "runs_dir": str(tmp_path_factory.mktemp("runs")),
            "device": "cpu",
            "model": {"hf_path": str(folders[0]), "megatron_path": "unused", "dtype": "float32"},
            "data": {"train_file": "unused", "heldout_file": "unused"},
            "sampling": {"max_prompt_tokens": 8, "max_response_tokens": 100},
            "server": {"engine": "reference", "device": "cpu", "dtype": "float32"},
        }
    )
    config.run_dir.mkdir()
    make_api_key(config)
    server = ServerProcess(config, 0)
    server.start()
    try:
        assert server.wait_until_ready(150)
        yield server
    finally:
        stop_servers([server])


@pytest.fixture
def control(server: ServerProcess, folders: list[Path]) -> Iterator[ServerControl]:
    """Of the server with the first model's weights as version 0."""
    control = ServerControl(server.address, timeout_s=120, vocabulary_size=64, headers=authorization(server._config))
    control.update_weights_from_disk(model_path=str(folders[0]), weight_version=0)
    yield control
    control.close()


def test_without_the_runs_key_nothing_but_health_is_answered(server: ServerProcess) -> None:
    """And the key shows in no command line and no log."""
    url, key = server.address.url, api_key(server._config)
    assert key
    assert requests.get(f"{url}/health", timeout=30).status_code == 200
    for headers in ({}, {"Authorization": "Bearer other"}):
        assert requests.get(f"{url}/model_info", headers=headers, timeout=30).status_code == 401
        for path in ("generate", "update_weights_from_disk", "init_weights_update_group", "pause_generation"):
            answer = requests.post(f"{url}/{path}", json={}, headers=headers, timeout=30)
            assert answer.status_code == 401, path
    assert requests.get(f"{url}/model_info", headers=authorization(server._config), timeout=30).status_code == 200
    assert server._process is not None
    assert key not in " ".join(psutil.Process(server._process.pid).cmdline())
    assert key not in server.log_file.read_text()


class UpdateGroup:
    """The trainer's side: rank 0 of a group with the server."""

    def __init__(self, control: ServerControl) -> None:
        self._control = control
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        where = {"master_address": "127.0.0.1", "master_port": port, "world_size": 2}
        where |= {"group_name": "weights", "backend": "gloo"}
        joining = start_for_all([control], "init_weights_update_group", rank_offset=1, **where)
        self._group = join_update_group(rank=0, **where)
        joining.wait()

    def send(self, tensors: list[tuple[str, Tensor]], version: int, flat: bool) -> None:
        receiving = start_for_all(
            [self._control],
            "update_weights_from_distributed",
            names=[name for name, _ in tensors],
            dtypes=[str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
            shapes=[list(tensor.shape) for _, tensor in tensors],
            group_name="weights",
            weight_version=version,
            load_format="flattened_bucket" if flat else None,
        )
        messages = [tensor.contiguous() for _, tensor in tensors]
        if flat:
            messages = [torch.cat([message.view(-1).view(torch.uint8) for message in messages])]
        for message in messages:
            dist.broadcast(message, src=0, group=self._group)
        receiving.wait()

    def end(self) -> None:
        self._control.destroy_weights_update_group(group_name="weights")
        dist.destroy_process_group(self._group)


@pytest.mark.parametrize("flat", [False, True])
def test_weights_come_by_broadcast(control: ServerControl, folders: list[Path], flat: bool) -> None:
    tensors = list(load_file(folders[1] / "model.safetensors").items())
    control.update_weights_from_disk(model_path=str(folders[1]), weight_version=1)
    wanted = control.weights_checksum()
    control.update_weights_from_disk(model_path=str(folders[0]), weight_version=0)
    assert control.weights_checksum() != wanted

    group = UpdateGroup(control)
    with pytest.raises(ControlError, match="must run between begin_weight_update"):
        group.send(tensors[:0], 1, flat=False)
    control.begin_weight_update()
    half = len(tensors) // 2
    group.send([("model.nowhere", torch.zeros(3)), *tensors[:half]], 1, flat)
    assert control.weights_checksum() != wanted
    group.send(
        [(name, tensor.bfloat16() if name == "model.norm.weight" else tensor) for name, tensor in tensors[half:]],
        1,
        flat,
    )
    control.end_weight_update()
    control.flush_cache()
    assert control.weights_checksum() == wanted  # the norm's ones are the same in bfloat16
    assert control.policy_version() == 1
    greedy = control.generate_greedy(PROMPT, 6)
    expected = log_probs_by_transformers(folders[1], PROMPT, np.asarray(greedy.token_ids), 1.0)
    assert np.abs(expected - np.asarray(greedy.log_probs)).max() < 1e-5
    group.end()


def test_versions_change_within_responses_across_a_pause(
    server: ServerProcess, control: ServerControl, folders: list[Path]
) -> None:
    async def main() -> list[dict]:
        parameters = [{"max_new_tokens": 80, "ignore_eos": True, "sampling_seed": seed} for seed in range(30)]
        request = {"input_ids": [PROMPT] * 30, "sampling_params": parameters, "return_logprob": True}
        async with aiohttp.ClientSession(headers=authorization(server._config)) as session:
            answer = asyncio.create_task(session.post(f"{server.address.url}/generate", json=request))
            while (await session.post(f"{server.address.url}/flush_cache")).status == 200:  # until they have begun
                await asyncio.sleep(0.01)
            # answered while the responses are sampled
            async with session.get(f"{server.address.url}/model_info") as response:
                assert (await response.json())["weight_version"] == "0"
            await asyncio.to_thread(control.pause_generation, "in_place")
            await asyncio.to_thread(
                control.update_weights_from_disk, model_path=str(folders[1]), weight_version=1, flush_cache=False
            )
            await asyncio.to_thread(control.continue_generation)
            return await (await answer).json()

    changes = []
    for answer in asyncio.run(main()):
        spans = [(span["version"], span["start"], span["end"]) for span in answer["meta_info"]["weight_versions"]]
        change = spans[-1][1]
        assert spans == ([("0", 0, change)] if change else []) + [("1", change, 80)]
        changes.append(change)
    assert 0 < max(changes) <= min(changes) + 1  # they take turns


def test_a_response_whose_client_has_gone_is_dropped(server: ServerProcess, control: ServerControl) -> None:
    url, headers = f"{server.address.url}/generate", authorization(server._config)
    request = {"rid": "gone", "input_ids": PROMPT, "sampling_params": {"max_new_tokens": 2}}
    control.pause_generation("in_place")
    with pytest.raises(requests.ReadTimeout):
        requests.post(url, json=request, headers=headers, timeout=(60, 0.3))
    with pytest.raises(requests.ReadTimeout):  # its id would be refused if the first were still waiting
        requests.post(url, json=request, headers=headers, timeout=(60, 0.3))
    control.continue_generation()
    assert requests.post(url, json=request, headers=headers, timeout=60).status_code == 200
