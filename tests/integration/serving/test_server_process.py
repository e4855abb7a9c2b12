"""Server processes without SGLang: command lines, ports, a start that fails, an end that leaves nothing behind."""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest

from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.config.seeds import derive_seed
from minpro_megatron.fleet.fleet import Fleet
from minpro_megatron.models.model_files import read_model_facts
from minpro_megatron.records import ServerAddress
from minpro_megatron.serving import server_process
from minpro_megatron.serving.endpoints import (
    endpoint_file,
    read_server_addresses,
    remove_server_address,
    write_server_address,
)
from minpro_megatron.serving.ports import PORT_RANGE
from minpro_megatron.serving.server_command import context_length, server_command, server_environment
from minpro_megatron.serving.server_process import (
    LOG_LINES,
    ServerProcess,
    ServerStartError,
    choose_port,
    stop_servers,
)
from minpro_megatron.serving.sglang_main import API_KEY_VARIABLE
from tests.support.rollout_fakes import run_config


@pytest.fixture
def hf_path(tmp_path: Path) -> Path:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text('{"vocab_size": 27, "eos_token_id": 1, "max_position_embeddings": 64}')
    return folder


def config(tmp_path: Path, hf_path: Path, **server: object) -> RunConfig:
    values = json.loads(run_config(tmp_path).to_json())
    values["model"]["hf_path"] = str(hf_path)
    values["server"] |= server
    return RunConfig.model_validate(values)


def test_the_command_line_on_a_cpu(tmp_path: Path, hf_path: Path) -> None:
    command = server_command(config(tmp_path, hf_path, max_total_tokens=4096), 0, 31000, 0)
    assert command[:3] == [sys.executable, "-m", "minpro_megatron.serving.sglang_main"]
    text = " ".join(command)
    for part in (
        f"--model-path {hf_path} ", "--host 127.0.0.1 ", "--port 31000 ", "--device cpu ", "--dtype float32 ",
        "--attention-backend torch_native", "--sampling-backend pytorch", "--max-total-tokens 4096",
        "--context-length 22 ", "--weight-version 0 ", "--skip-tokenizer-init", "--sleep-on-idle",
    ):  # fmt: skip
        assert part in text
    environment = server_environment(config(tmp_path, hf_path), {"PATH": "p", "NO_PROXY": "intranet"})
    assert environment["SGLANG_USE_CPU_ENGINE"] == environment["OMP_NUM_THREADS"] == "1"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert int(environment["SGLANG_TIMEOUT_KEEP_ALIVE"]) > 15  # aiohttp keeps an idle connection for 15 s
    assert (environment["PATH"], environment["NO_PROXY"]) == ("p", "intranet,127.0.0.1,127.0.0.1,localhost")


def test_the_command_line_on_gpus(tmp_path: Path, hf_path: Path) -> None:
    on_gpus = config(tmp_path, hf_path, device="cuda", dtype="bfloat16", tensor_parallel=4)
    text = " ".join(server_command(on_gpus, 1, 31001, 1))
    for part in ("--device cuda ", "--dtype bfloat16 ", "--tp-size 4 ", "--base-gpu-id 4 ", "--enable-fp32-lm-head"):
        assert part in text
    assert "torch_native" not in text
    assert "max-total-tokens" not in text
    rounded = config(tmp_path, hf_path, device="cuda", arguments={"enable_fp32_lm_head": None})
    assert "--enable-fp32-lm-head" not in server_command(rounded, 1, 31001, 1)
    assert "SGLANG_USE_CPU_ENGINE" not in server_environment(on_gpus, {})


def test_servers_on_shared_gpus_have_no_segments_that_cannot_be_released(tmp_path: Path, hf_path: Path) -> None:
    given = {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "PYTORCH_CUDA_ALLOC_CONF": "a:1,expandable_segments:True",
    }
    apart = config(tmp_path, hf_path, device="cuda", dtype="bfloat16")
    assert server_environment(apart, given) | given == server_environment(apart, given)
    server = apart.server.model_copy(update={"placement": "shared"})
    shared = apart.model_copy(update={"server": server})
    assert "--enable-memory-saver" in server_command(shared, 0, 31000, 0)
    found = server_environment(shared, given)
    assert [found[name] for name in given] == ["", "a:1"]
    assert not given.keys() & server_environment(shared, {}).keys()


def test_options_of_sglang_are_handed_on(tmp_path: Path, hf_path: Path) -> None:
    arguments = {
        "chunked_prefill_size": 2048,  # instead of this project's 4096 on a CPU
        "sampling_backend": None,  # left to SGLang
        "enable_mixed_chunk": True,
        "enable_symm_mem": False,
        "gc_threshold": [700, 10],
        "radix_eviction_policy_config": {"threshold": 4},
        "served_model_name": "-x",
    }
    settings = config(tmp_path, hf_path, tensor_parallel=2, expert_parallel=2, memory_fraction=0.8, arguments=arguments)
    assert server_command(settings, 0, 31000, 0)[3:] == [
        "--model-path", str(hf_path), "--host", "127.0.0.1", "--port", "31000", "--device", "cpu",
        "--dtype", "float32", "--tp-size", "2", "--context-length", "22", "--max-running-requests", "256",
        "--random-seed", str(derive_seed(settings.seed, "server", 0)), "--weight-version", "0",
        "--log-level-http", "warning", "--decode-log-interval", "1000", "--attention-backend", "torch_native",
        "--chunked-prefill-size", "2048", "--max-total-tokens", "5632", "--mem-fraction-static", "0.8",
        "--ep-size", "2", "--skip-tokenizer-init", "--skip-server-warmup", "--sleep-on-idle", "--enable-mixed-chunk",
        "--no-enable-symm-mem", "--gc-threshold", "700", "10", "--radix-eviction-policy-config", '{"threshold": 4}',
        "--served-model-name=-x",
    ]  # fmt: skip


def test_servers_draw_from_different_random_numbers(tmp_path: Path, hf_path: Path) -> None:
    commands = [server_command(config(tmp_path, hf_path), index, 31000, index) for index in (0, 1)]
    first, second = (command[command.index("--random-seed") + 1] for command in commands)
    assert first != second


def test_sequences_that_do_not_fit_are_refused(tmp_path: Path, hf_path: Path) -> None:
    # SGLang would shorten them silently.
    assert context_length(config(tmp_path, hf_path)) == 8 + 6 + 8
    with pytest.raises(ValueError, match=r"= 22 exceeds server.max_total_tokens = 21; raise it"):
        context_length(config(tmp_path, hf_path, max_total_tokens=21))
    (hf_path / "config.json").write_text('{"vocab_size": 27, "eos_token_id": 1, "max_position_embeddings": 21}')
    with pytest.raises(ValueError, match="= 22 exceeds the model's max_position_embeddings = 21"):
        context_length(config(tmp_path, hf_path))


def test_stop_tokens_are_those_of_both_files(hf_path: Path) -> None:
    (hf_path / "generation_config.json").write_text('{"eos_token_id": [3, 1]}')
    assert read_model_facts(str(hf_path)).stop_token_ids == (1, 3)
    (hf_path / "generation_config.json").write_text('{"eos_token_id": [27]}')
    with pytest.raises(ValueError, match=r"eos_token_id = \[1, 27\] must lie within vocab_size = 27"):
        read_model_facts(str(hf_path))


def test_other_special_tokens_can_end_a_response_too(hf_path: Path) -> None:
    added = [{"id": 5, "content": "<|im_end|>"}, {"id": 6, "content": "<|im_start|>"}]
    (hf_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    assert read_model_facts(str(hf_path), ["<|im_end|>"]).stop_token_ids == (1, 5)
    with pytest.raises(ValueError, match=r"extra_stop_tokens: '<eot>' is not a special token of .* '<|im_end|>'"):
        read_model_facts(str(hf_path), ["<eot>"])


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])  # of released checkpoints; of transformers 5
def test_the_facts_about_experts(hf_path: Path, name: str) -> None:
    facts = read_model_facts(str(hf_path))
    assert (facts.num_layers, facts.num_experts, facts.experts_per_token) == (0, 0, 0)
    values = {"vocab_size": 27, "eos_token_id": 1, "max_position_embeddings": 64, name: 8}
    (hf_path / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 3, "num_experts_per_tok": 2}))
    facts = read_model_facts(str(hf_path))
    assert (facts.num_layers, facts.num_experts, facts.experts_per_token) == (3, 8, 2)
    (hf_path / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="num_experts_per_tok = None must be a positive integer"):
        read_model_facts(str(hf_path))


def test_routes_are_asked_of_servers_and_of_models_that_have_them(tmp_path: Path, hf_path: Path) -> None:
    settings = config(tmp_path, hf_path)
    assert "--enable-return-routed-experts" not in server_command(settings, 0, 31000, 0)
    values = json.loads(settings.to_json())
    values["model"]["routing_replay"] = "rollout"
    replaying = RunConfig.model_validate(values)
    assert "--enable-return-routed-experts" in server_command(replaying, 0, 31000, 0)
    with pytest.raises(ValueError, match=r"model.routing_replay = 'rollout': .* has no experts"):
        Fleet(replaying, read_model_facts(str(hf_path)), 0)


@pytest.mark.parametrize(
    ("mode", "pause_mode", "is_off"),
    [
        ("bounded", "in_place", True),
        ("bounded", "retract", False),
        ("bounded", "abort", False),
        ("delay", "in_place", False),  # nothing is under way when the weights change
    ],
)
def test_overlap_scheduling_is_off_where_weights_change_in_place(
    tmp_path: Path, hf_path: Path, mode: str, pause_mode: str, is_off: bool
) -> None:
    overrides = [f"staleness.mode={mode}", f"publish.pause_mode={pause_mode}"]
    command = server_command(with_overrides(config(tmp_path, hf_path), overrides), 0, 31000, 0)
    assert ("--disable-overlap-schedule" in command) == is_off


def test_the_death_of_another_server_does_not_end_one_on_a_gpu(tmp_path: Path, hf_path: Path) -> None:
    variable = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    on_gpu = server_environment(config(tmp_path, hf_path, device="cuda"), {variable: "1"})
    assert on_gpu[variable] == "0"
    assert variable not in server_environment(config(tmp_path, hf_path), {})


def test_the_key_is_in_the_environment_and_not_in_the_command_line(tmp_path: Path, hf_path: Path) -> None:
    settings = config(tmp_path, hf_path, api_key_variable="THE_KEY")
    assert server_environment(settings, {"THE_KEY": "k-1"})[API_KEY_VARIABLE] == "k-1"
    assert "k-1" not in " ".join(server_command(settings, 0, 31000, 0))
    assert API_KEY_VARIABLE not in server_environment(config(tmp_path, hf_path), {"THE_KEY": "k-1"})
    with pytest.raises(ValueError, match="'THE_KEY': this environment variable is not set"):
        server_environment(settings, {})


@pytest.mark.parametrize(
    ("text", "problem"),
    [("{", "not JSON"), ("[]", "expected a JSON object"), ('{"vocab_size": "27"}', "vocab_size = '27' must be")],
)
def test_a_damaged_checkpoint_is_named(hf_path: Path, text: str, problem: str) -> None:
    (hf_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=problem):
        read_model_facts(str(hf_path))


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model.hf_path = .*config.json is missing"):
        read_model_facts(str(tmp_path))


def test_a_taken_port_is_refused_before_anything_starts(tmp_path: Path, hf_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServerStartError, match=f"server 0: port {port} on 127.0.0.1 is taken"):
            ServerProcess(config(tmp_path, hf_path, first_port=port), 0).start()
    with pytest.raises(ServerStartError, match=r"server.host = '192.0.2.1', port 7: cannot listen there"):
        choose_port(config(tmp_path, hf_path, host="192.0.2.1", first_port=7), 0)  # an address of documentation
    with pytest.raises(ServerStartError, match=r"no port on server.host = '192.0.2.1' can be used"):
        choose_port(config(tmp_path, hf_path, host="192.0.2.1"), 0)
    free = choose_port(config(tmp_path, hf_path), 0)
    assert free in PORT_RANGE
    assert choose_port(config(tmp_path, hf_path, first_port=free), 0) == free


def started(monkeypatch: pytest.MonkeyPatch, settings: RunConfig, program: str) -> ServerProcess:
    command = [sys.executable, "-I", "-S", "-c", program]
    monkeypatch.setattr(server_process, "server_command", lambda *_: command)
    server = ServerProcess(settings, 0)
    server.start()
    return server


@pytest.mark.parametrize(("host", "stated"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1")])
def test_a_server_on_all_interfaces_states_one(
    tmp_path: Path, hf_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, stated: str
) -> None:
    settings = config(tmp_path, hf_path, host=host)
    command = server_command(settings, 0, 31000, 0)
    assert command[command.index("--host") + 1] == host  # where it listens stays as it is
    server = started(monkeypatch, settings, "")
    assert server.address.url.rpartition(":")[0] == f"http://{stated}"
    stop_servers([server])


def test_a_server_that_ends_says_why(tmp_path: Path, hf_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a few lines, not with all that it said while it loaded."""
    program = "for n in range(40): print('line', n)\nprint('a.py:1: UserWarning: w\\n  w()')\nraise SystemExit(7)"
    server = started(monkeypatch, config(tmp_path, hf_path), program)
    with pytest.raises(ServerStartError) as caught:
        server.wait_until_ready(10)
    assert "server 0: its process ended with status 7" in str(caught.value)
    assert str(server.log_file) in str(caught.value)
    assert str(caught.value).splitlines()[1:] == [f"line {number}" for number in range(40 - LOG_LINES, 40)]


def test_a_server_that_is_too_slow_says_so(tmp_path: Path, hf_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = started(monkeypatch, config(tmp_path, hf_path), "import time; time.sleep(60)")
    try:
        with pytest.raises(ServerStartError, match=r"not ready after server.start_timeout_s"):
            server.wait_until_ready(0.01)
        assert server.wait_until_ready(10, cancelled=lambda: True) is False
    finally:
        stop_servers([server])
    assert server.exit_status == -signal.SIGTERM


STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
# One child in a session of its own, as a kill of the process group alone would miss.
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
for new_session in (False, True):
    subprocess.Popen([sys.executable, "-I", "-S", "-c", child], start_new_session=new_session)
time.sleep(60)
"""


def test_the_end_takes_every_process_along(tmp_path: Path, hf_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = started(monkeypatch, config(tmp_path, hf_path), STUBBORN)
    deadline = time.monotonic() + 60
    while server.log_tail().count("up") < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server._process is not None
    members = [psutil.Process(server._process.pid)]
    members += members[0].children(recursive=True)
    assert len(members) == 3
    begin = time.monotonic()
    stop_servers([server], grace_s=0.05)
    assert time.monotonic() - begin < 30  # they would sleep for 60 s
    assert server.exit_status == -signal.SIGKILL
    assert not any(member.is_running() and member.status() != psutil.STATUS_ZOMBIE for member in members)


def test_addresses_of_another_incarnation_do_not_count(tmp_path: Path) -> None:
    addresses = [
        ServerAddress(index=index, url=f"http://127.0.0.1:{31000 + index}", tensor_parallel=1) for index in (0, 1)
    ]
    write_server_address(tmp_path, addresses[0], incarnation=1)
    write_server_address(tmp_path, addresses[1], incarnation=2)
    assert read_server_addresses(tmp_path, 2, incarnation=2) == [addresses[1]]
    write_server_address(tmp_path, addresses[0], incarnation=2)
    assert read_server_addresses(tmp_path, 2, incarnation=2) == addresses
    assert os.listdir(endpoint_file(tmp_path, 0, 2).parent) != []
    remove_server_address(tmp_path, 0, incarnation=2)
    assert read_server_addresses(tmp_path, 2, incarnation=2) == addresses[1:]
