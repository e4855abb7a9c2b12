"""How a run is spread over nodes, and which layouts are refused."""

import re

import pytest

from minpro_megatron.config.publish import PublishConfig
from minpro_megatron.launch.topology import TopologySettings, lay_out, read_topology
from tests.support.run_examples import example_config

GPU_SERVER = {"device": "cuda", "count": 8, "tensor_parallel": 2}


def gpu_run(tmp_path, parallel, **server):
    return example_config(tmp_path, device="cuda", parallel=parallel, server=GPU_SERVER | server)


def shares(config, **settings):
    """(ranks, first server, servers, collects) of each node."""
    nodes = lay_out(config, TopologySettings(**settings)).nodes
    return [(node.ranks, node.first_server, node.num_servers, node.collects) for node in nodes]


def test_what_fits_one_node_is_on_one(tmp_path):
    config = gpu_run(tmp_path, {"tensor": 4}, count=2)
    assert shares(config) == [(4, 0, 2, True)]
    assert shares(example_config(tmp_path), gpus_per_node=0) == [(1, 0, 1, True)]


def test_more_takes_as_few_nodes_as_it_needs(tmp_path):
    config = gpu_run(tmp_path, {"tensor": 4, "pipeline": 4, "data": 2}, count=6)
    assert shares(config) == [(8, 0, 0, False)] * 4 + [(0, 0, 3, True), (0, 3, 3, False)]
    topology = lay_out(config, TopologySettings())
    assert (topology.training_nodes, topology.serving_nodes) == ([0, 1, 2, 3], [4, 5])
    assert (topology.collecting_node, topology.deciding_nodes) == (4, [0, 1, 2, 3, 4])


def test_the_last_node_may_have_fewer_servers(tmp_path):
    config = gpu_run(tmp_path, {"tensor": 8}, count=6)
    assert shares(config)[1:] == [(0, 0, 3, True), (0, 3, 3, False)]
    seven = gpu_run(tmp_path, {"tensor": 8}, count=7)
    assert shares(seven)[1:] == [(0, 0, 4, True), (0, 4, 3, False)]


def test_servers_may_share_the_training_nodes(tmp_path):
    config = gpu_run(tmp_path, {"tensor": 4, "pipeline": 2}, count=2)
    assert shares(config, train_nodes=2, serve_nodes=2, share_nodes=True) == [(4, 0, 1, True), (4, 1, 1, False)]
    cpu = example_config(tmp_path, parallel={"tensor": 2}, server={"device": "cpu", "dtype": "float32"})
    settings = {"gpus_per_node": 0, "train_nodes": 2, "serve_nodes": 1, "share_nodes": True}
    assert shares(cpu, **settings) == [(1, 0, 0, False), (1, 0, 1, True)]


def test_other_roles_need_other_nodes(tmp_path):
    remote = gpu_run(tmp_path, {"tensor": 8}, urls=["http://10.0.0.1:1"])
    assert shares(remote) == [(8, 0, 0, True)]
    timer = example_config(tmp_path, device="cuda", server=GPU_SERVER, debug={"trainer": "timer"})
    assert shares(timer) == [(0, 0, 4, True), (0, 4, 4, False)]
    alone = example_config(tmp_path, device="cuda", parallel={"tensor": 8}, debug={"journal": "j"})
    assert shares(alone) == [(8, 0, 0, False)]


@pytest.mark.parametrize(
    ("parallel", "server", "settings", "problem"),
    [
        ({"tensor": 4, "data": 9}, {}, {}, r"= 36 ranks do not divide evenly over 5 nodes: change parallel.data"),
        (
            {"tensor": 8, "data": 2},
            {},
            {"train_nodes": 1},
            r"are 16 per node, with topology.gpus_per_node = 8: give at ",
        ),
        ({"tensor": 16}, {}, {}, r"parallel.tensor = 16: its ranks must be on one node"),
        (
            {"tensor": 8},
            {"tensor_parallel": 16},
            {},
            r"server.tensor_parallel = 16: a server must fit on one node, .* lower",
        ),
        ({"tensor": 8}, {"count": 2}, {"serve_nodes": 3}, r"topology.serve_nodes = 3: server.count = 2 leaves some"),
        ({"tensor": 8}, {}, {"serve_nodes": 1}, r"server.count = 8 .* and only 4 of .* fit .* give at least 2 nodes"),
        ({"tensor": 8}, {}, {"serve_nodes": 2, "share_nodes": True}, r"share_nodes = true: a node would need 16 GPUs"),
        ({"tensor": 8}, {}, {"gpus_per_node": 0}, r"gpus_per_node = 0: device and server.device = cuda need GPUs"),
    ],
)
def test_impossible_layouts_are_refused_with_a_remedy(tmp_path, parallel, server, settings, problem):
    with pytest.raises(ValueError, match=problem):
        shares(gpu_run(tmp_path, parallel, **server), **settings)


def test_memory_is_shared_on_one_node_only(tmp_path):
    """Servers on another machine would not find it."""
    publish = PublishConfig(transport="shared_memory")
    one, many = (
        gpu_run(tmp_path, parallel, count=2).model_copy(update={"publish": publish})
        for parallel in ({"tensor": 4}, {"tensor": 4, "pipeline": 2})
    )
    assert shares(one) == [(4, 0, 2, True)]
    for settings in ({}, {"train_nodes": 2, "serve_nodes": 2, "share_nodes": True}):
        with pytest.raises(ValueError, match=r"publish.transport = shared_memory with 2 nodes: .* set it to broadcast"):
            shares(many, **settings)


def test_it_travels_as_json(tmp_path):
    topology = lay_out(gpu_run(tmp_path, {"tensor": 8}), TopologySettings())
    path = tmp_path / "topology.json"
    path.write_text(topology.to_json())
    assert read_topology(path) == topology
    path.write_text('{"nodes": [{"rank": 1}]}')
    with pytest.raises(ValueError, match=rf"--topology {re.escape(str(path))}: .*rank.*; submit the job again"):
        read_topology(path)
