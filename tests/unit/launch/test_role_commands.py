"""Each role's command line and environment."""

import sys
from pathlib import Path

import pytest

from minpro_megatron.launch import roles
from minpro_megatron.launch.node_roles import NodePlace, node_commands
from minpro_megatron.launch.roles import role_commands
from minpro_megatron.launch.topology import TopologySettings, lay_out
from tests.support.run_examples import example_config, write_example_files


def commands(config, environment=None):
    made = role_commands(config, Path("/run.json"), incarnation=3, environment=environment or {"HOME": "/h"})
    return {command.role: command for command in made}


def test_every_role_gets_the_config_and_the_incarnation(tmp_path):
    made = commands(example_config(tmp_path, parallel={"tensor": 2, "expert": 2}))
    assert list(made) == ["serve", "collect", "train"]
    for role, command in made.items():
        tail = ["-m", "minpro_megatron", role, "--config", "/run.json", "--incarnation", "3"]
        assert command.arguments[0] == sys.executable
        assert command.arguments[-len(tail) :] == tail
        assert command.environment["HOME"] == "/h"
        assert command.environment["PYTHONUNBUFFERED"] == "1"
    assert [command.stays for command in made.values()] == [True, False, False]


def test_the_trainer_has_a_process_a_rank_and_stays_on_this_machine(tmp_path):
    arguments = commands(example_config(tmp_path, parallel={"tensor": 2, "pipeline": 3}))["train"].arguments
    assert arguments[1:3] == ["-m", "torch.distributed.run"]
    for option in ("--nproc-per-node=6", "--nnodes=1", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"):
        assert option in arguments


def test_a_cpu_run_sees_no_gpu_and_one_thread_a_rank(tmp_path):
    made = commands(example_config(tmp_path), {"CUDA_VISIBLE_DEVICES": "0,1", "OMP_NUM_THREADS": "8"})
    assert {command.environment["CUDA_VISIBLE_DEVICES"] for command in made.values()} == {""}
    assert made["train"].environment["OMP_NUM_THREADS"] == "1"
    assert made["train"].environment["GLOO_SOCKET_IFNAME"].startswith("lo")
    assert made["serve"].environment["OMP_NUM_THREADS"] == "8"


@pytest.mark.parametrize(
    ("environment", "trainer", "servers"),
    [({}, "0,1", "2,3,4,5"), ({"CUDA_VISIBLE_DEVICES": "7,6,5,4,3,2"}, "7,6", "5,4,3,2")],
)
def test_trainer_and_servers_get_different_gpus(tmp_path, environment, trainer, servers):
    server = {"device": "cuda", "count": 2, "tensor_parallel": 2}
    config = example_config(tmp_path, device="cuda", server=server, parallel={"tensor": 2})
    made = commands(config, environment)
    assert made["train"].environment["CUDA_VISIBLE_DEVICES"] == trainer
    assert made["serve"].environment["CUDA_VISIBLE_DEVICES"] == servers
    assert made["collect"].environment["CUDA_VISIBLE_DEVICES"] == ""
    assert "GLOO_SOCKET_IFNAME" not in made["train"].environment


def test_trainer_and_servers_of_one_nccl_group_allocate_alike(tmp_path):
    server = {"device": "cuda", "count": 2}
    config = example_config(tmp_path, device="cuda", server=server, parallel={"tensor": 2})
    for given, expected in (({}, ("0", "0")), ({"NCCL_CUMEM_ENABLE": "1", "NCCL_NVLS_ENABLE": "2"}, ("1", "2"))):
        for role in ("train", "serve"):
            environment = commands(config, {"HOME": "/h"} | given)[role].environment
            assert (environment["NCCL_CUMEM_ENABLE"], environment["NCCL_NVLS_ENABLE"]) == expected
    assert "NCCL_CUMEM_ENABLE" not in commands(example_config(tmp_path))["train"].environment


def test_the_trainers_allocator_grows_its_segments_unless_the_user_has_chosen(tmp_path):
    server = {"device": "cuda", "count": 2}
    config = example_config(tmp_path, device="cuda", server=server, parallel={"tensor": 2})
    made = commands(config, {})
    assert made["train"].environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_ALLOC_CONF" not in made["serve"].environment
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        given = commands(config, {name: "backend:native"})["train"].environment
        assert {key: value for key, value in given.items() if key.endswith("ALLOC_CONF")} == {name: "backend:native"}
    assert "PYTORCH_ALLOC_CONF" not in commands(example_config(tmp_path), {})["train"].environment


def test_ranks_that_compute_adamw_on_the_cpu_have_threads_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(roles, "usable_cpus", lambda: 96)
    model = {"hf_path": str(tmp_path / "hf"), "megatron_path": str(tmp_path / "megatron"), "dtype": "bfloat16"}
    run = {"device": "cuda", "parallel": {"tensor": 2, "data": 2}, "model": model}
    config = example_config(tmp_path, optimizer={"cpu_offload": 0.5}, **run)
    assert commands(config)["train"].environment["OMP_NUM_THREADS"] == "12"
    assert "OMP_NUM_THREADS" not in commands(config)["serve"].environment
    assert commands(config, {"OMP_NUM_THREADS": "7"})["train"].environment["OMP_NUM_THREADS"] == "7"
    assert "OMP_NUM_THREADS" not in commands(example_config(tmp_path, **run))["train"].environment
    two_nodes = TopologySettings(gpus_per_node=2)
    place = NodePlace(index=1, address="10.0.0.1", interface="e", head_address="10.0.0.0", rendezvous_port=1)
    made = node_commands(config, Path("/run.json"), 0, lay_out(config, two_nodes), place, {})
    assert [command.environment.get("OMP_NUM_THREADS") for command in made] == ["24"]


def test_nothing_is_looked_up_on_the_hub_for_a_local_model(tmp_path):
    assert "HF_HUB_OFFLINE" not in commands(example_config(tmp_path))["train"].environment
    write_example_files(tmp_path)
    assert commands(example_config(tmp_path))["serve"].environment["HF_HUB_OFFLINE"] == "1"
