"""The commands of one node of several: its ranks, its servers, the addresses that others can reach."""

from pathlib import Path

from minpro_megatron.launch.node_roles import NodePlace, node_commands
from minpro_megatron.launch.topology import TopologySettings, lay_out
from tests.support.run_examples import example_config

CONFIG = Path("/run.json")


def place(index: int) -> NodePlace:
    return NodePlace(
        index=index, address=f"10.0.0.{index}", interface="eth7", head_address="10.0.0.0", rendezvous_port=4567
    )


def commands(config, settings, index, environment=None):
    topology = lay_out(config, settings)
    made = node_commands(config, CONFIG, 3, topology, place(index), environment or {"HOME": "/h"})
    return {command.role: command for command in made}


def gpu_run(tmp_path, **changes):
    server = {"device": "cuda", "count": 4, "tensor_parallel": 2}
    return example_config(tmp_path, device="cuda", server=server, parallel={"tensor": 2, "data": 6}, **changes)


def with_hosts(config, host):
    parts = {"server": config.server, "collector": config.collector}
    return config.model_copy(update={name: part.model_copy(update={"host": host}) for name, part in parts.items()})


SEPARATE = TopologySettings(gpus_per_node=4)  # three training nodes, two serving ones


def test_each_node_has_its_own_roles(tmp_path):
    config = gpu_run(tmp_path)
    made = [commands(config, SEPARATE, index) for index in range(5)]
    assert [list(one) for one in made] == [["train"], ["train"], ["train"], ["serve", "collect"], ["serve"]]
    for index, one in enumerate(made):
        for role, command in one.items():
            tail = ["-m", "minpro_megatron", role, "--config", "/run.json", "--incarnation", "3"]
            at = command.arguments.index("minpro_megatron") - 1
            assert command.arguments[at : at + len(tail)] == tail
            assert command.stays == (role == "serve")
            assert command.log_name == ("collect" if role == "collect" else f"{role}-node-{index}")


def test_the_trainers_nodes_meet_at_the_first(tmp_path):
    arguments = [commands(gpu_run(tmp_path), SEPARATE, index)["train"].arguments for index in range(3)]
    for rank, given in enumerate(arguments):
        for option in (
            "--nproc-per-node=4", "--nnodes=3", f"--node-rank={rank}", "--rdzv-backend=static",
            "--master-addr=10.0.0.0", "--master-port=4567", f"--local-addr=10.0.0.{rank}", "--max-restarts=0",
        ):  # fmt: skip
            assert option in given


def test_servers_have_global_numbers_and_routable_addresses(tmp_path):
    config = gpu_run(tmp_path)
    for index, servers in ((3, "0:2"), (4, "2:4")):
        arguments = commands(config, SEPARATE, index)["serve"].arguments
        assert arguments[-4:] == ["--host", f"10.0.0.{index}", "--servers", servers]
    assert commands(config, SEPARATE, 3)["collect"].arguments[-2:] == ["--host", "10.0.0.3"]
    for host in ("0.0.0.0", "::", "localhost", "127.0.1.1", "::1"):  # none that another node could go to
        made = commands(with_hosts(config, host), SEPARATE, 3)
        assert made["serve"].arguments[-4:] == ["--host", "10.0.0.3", "--servers", "0:2"]
        assert made["collect"].arguments[-2:] == ["--host", "10.0.0.3"]
    for host in ("10.5.0.3", "fd00::3", "node-3"):
        assert not any("--host" in one.arguments for one in commands(with_hosts(config, host), SEPARATE, 3).values())


def test_on_one_node_everything_stays_on_it(tmp_path):
    made = commands(example_config(tmp_path), TopologySettings(gpus_per_node=0), 0)
    assert list(made) == ["serve", "collect", "train"]
    assert not {"--host", "--servers"} & {word for command in made.values() for word in command.arguments}
    assert "--local-addr=127.0.0.1" in made["train"].arguments
    assert made["train"].environment["GLOO_SOCKET_IFNAME"] == "lo"
    assert made["train"].log_name == "train"


def test_process_groups_use_the_interface_of_the_address(tmp_path):
    config = gpu_run(tmp_path)
    for role, index in (("train", 0), ("serve", 4)):
        environment = commands(config, SEPARATE, index)[role].environment
        assert (environment["GLOO_SOCKET_IFNAME"], environment["NCCL_SOCKET_IFNAME"]) == ("eth7", "=eth7")
        chosen = commands(config, SEPARATE, index, {"NCCL_SOCKET_IFNAME": "ib"})[role].environment
        assert chosen["NCCL_SOCKET_IFNAME"] == "ib"
    cpu = example_config(tmp_path, parallel={"tensor": 2})
    two = TopologySettings(gpus_per_node=0, train_nodes=2, serve_nodes=1, share_nodes=True)
    assert commands(cpu, two, 0)["train"].environment["GLOO_SOCKET_IFNAME"] == "eth7"


def test_roles_of_a_shared_node_have_different_gpus(tmp_path):
    shared = TopologySettings(gpus_per_node=8, train_nodes=3, serve_nodes=2, share_nodes=True)
    made = commands(gpu_run(tmp_path), shared, 1, {"CUDA_VISIBLE_DEVICES": "7,6,5,4,3,2,1,0"})
    assert made["train"].environment["CUDA_VISIBLE_DEVICES"] == "7,6,5,4"
    assert made["serve"].environment["CUDA_VISIBLE_DEVICES"] == "3,2,1,0"
    assert made["collect"].environment["CUDA_VISIBLE_DEVICES"] == ""


def test_servers_of_others_are_watched_beside_the_collector(tmp_path):
    server = {"device": "cuda", "urls": ["http://10.9.0.1:30000"]}
    config = example_config(tmp_path, device="cuda", server=server, parallel={"tensor": 2, "data": 4})
    made = [commands(config, SEPARATE, index) for index in (0, 1)]
    assert [list(one) for one in made] == [["serve", "collect", "train"], ["train"]]
    assert "--servers" not in made[0]["serve"].arguments
