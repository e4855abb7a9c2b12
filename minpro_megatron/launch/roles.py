"""The command line and environment of each role's process."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from minpro_megatron.config.run import RunConfig
from minpro_megatron.launch.supervisor import RoleCommand


def role_commands(
    config: RunConfig, config_file: Path, incarnation: int, environment: Mapping[str, str] = os.environ
) -> list[RoleCommand]:
    """The commands of serve, collect and train, to be started together."""
    shared = dict(environment) | {"PYTHONUNBUFFERED": "1"}
    if Path(config.model.hf_path).is_dir():
        shared |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    trainer_gpus, server_gpus = gpu_shares(config, environment)
    options = ["--config", str(config_file), "--incarnation", str(incarnation)]
    package = [sys.executable, "-m", "minpro_megatron"]
    return [
        RoleCommand(
            role="serve",
            arguments=[*package, "serve", *options],
            environment=shared | {"CUDA_VISIBLE_DEVICES": server_gpus},
            stays=True,
        ),
        RoleCommand(
            role="collect",
            arguments=[*package, "collect", *options],
            environment=shared | {"CUDA_VISIBLE_DEVICES": ""},
        ),
        RoleCommand(
            role="train",
            arguments=[*torchrun(config.parallel.world_size), "-m", "minpro_megatron", "train", *options],
            environment=shared | trainer_environment(config.device) | {"CUDA_VISIBLE_DEVICES": trainer_gpus},
        ),
    ]


def torchrun(world_size: int) -> list[str]:
    """The start of a command line that runs what follows it as `world_size` ranks on this machine."""
    # --local-addr: else torchrun gives the workers the machine's own name to meet at, which need not resolve.
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={world_size}",
        "--nnodes=1",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0",
        "--local-addr=127.0.0.1",
        "--max-restarts=0",
    ]


def trainer_environment(device: str) -> dict[str, str]:
    """What ranks that compute on `device` (cpu or cuda) need beside the environment of their parent."""
    # megatron-core announces, once a rank and module, every optional package that is not installed.
    quiet = {"PYTHONWARNINGS": "ignore::UserWarning,ignore::FutureWarning,ignore::DeprecationWarning"}
    if device == "cpu":
        # The ranks are the parallelism: with a thread pool each they would only take turns on the same cores.
        loopback = "lo" if sys.platform.startswith("linux") else "lo0"
        return quiet | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": loopback}
    # megatron overlaps tensor-parallel communication with computation only if kernels start in launch order.
    return quiet | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}


def gpus_needed(config: RunConfig) -> tuple[int, int]:
    """The number of GPUs of the trainer and of the servers on this machine."""
    trainer = config.parallel.world_size if config.device == "cuda" else 0
    servers = config.server.count * config.server.tensor_parallel if config.server.device == "cuda" else 0
    return trainer, servers


def gpu_shares(config: RunConfig, environment: Mapping[str, str]) -> tuple[str, str]:
    """CUDA_VISIBLE_DEVICES of the trainer and of the servers: disjoint shares, "" without a GPU."""
    trainer, servers = gpus_needed(config)
    given = environment.get("CUDA_VISIBLE_DEVICES")
    visible = given.split(",") if given else [str(index) for index in range(trainer + servers)]
    return ",".join(visible[:trainer]), ",".join(visible[trainer : trainer + servers])
