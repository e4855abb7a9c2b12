"""The command line and environment of each role's process."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from minpro_megatron.config.run import RunConfig
from minpro_megatron.launch.supervisor import RoleCommand
from minpro_megatron.serving.server_command import ALLOCATOR_VARIABLES

# The trainer's rank 0 and the servers are members of one NCCL group. If members allocate memory in different ways, its
# first broadcast fails ("invalid argument"), so all roles get SGLang's default
# (sglang/srt/entrypoints/engine.py, _set_envs_and_config).
NCCL_MEMORY = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}


def roles_of(config: RunConfig) -> tuple[str, ...]:
    """The roles of the run."""
    if not config.samples_responses:
        return ("train",)
    return ("serve", "collect", "timer" if config.debug.trainer == "timer" else "train")


def role_commands(
    config: RunConfig,
    config_file: Path,
    incarnation: int,
    environment: Mapping[str, str] = os.environ,
    save_by: float | None = None,
) -> list[RoleCommand]:
    """The commands of the run's roles, to be started together on one machine. `save_by`: Unix time by which the
    trainer must have saved, if this start has a time limit."""
    starts = {"train": torchrun(config.parallel.world_size)}
    own = {
        "train": trainer_environment(config.device) | offload_threads(config, config.parallel.world_size, environment)
    }
    trainer_gpus, server_gpus = gpu_shares(*gpus_needed(config), environment, config.server.takes_turns)
    environments = role_environments(config, environment, trainer_gpus, server_gpus, own)
    options = ["--config", str(config_file), "--incarnation", str(incarnation)]
    return [
        RoleCommand(
            role=role,
            arguments=[
                *starts.get(role, [sys.executable]),
                "-m", "minpro_megatron", role, *options, *(save_by_option(save_by) if role == "train" else []),
            ],
            environment=environments[role],
            stays=role == "serve",
        )
        for role in roles_of(config)
    ]  # fmt: skip


def save_by_option(save_by: float | None) -> list[str]:
    """The trainer's option for `save_by`."""
    return [] if save_by is None else ["--save-by", f"{save_by:.0f}"]


def role_environments(
    config: RunConfig,
    environment: Mapping[str, str],
    trainer_gpus: str,
    server_gpus: str,
    own: Mapping[str, Mapping[str, str]],
) -> dict[str, dict[str, str]]:
    """The environment of each role: the given one, the variables of all roles, its GPUs, and its own variables."""
    shared = dict(environment) | {"PYTHONUNBUFFERED": "1"}
    if Path(config.model.hf_path).is_dir():
        shared |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if config.device == "cuda":
        shared = NCCL_MEMORY | shared
    gpus = {"serve": server_gpus, "train": trainer_gpus}
    allocators = {"train": _allocator(environment)} if config.device == "cuda" else {}
    return {
        role: shared | {"CUDA_VISIBLE_DEVICES": gpus.get(role, "")} | allocators.get(role, {}) | dict(own.get(role, {}))
        for role in roles_of(config)
    }


def _allocator(environment: Mapping[str, str]) -> dict[str, str]:
    """Lets the trainer's allocator grow its segments, so that rows of many lengths leave less memory unused; {} if the
    user has chosen. Servers keep torch's default: SGLang allocates its pools once."""
    if any(name in environment for name in ALLOCATOR_VARIABLES):
        return {}
    return {ALLOCATOR_VARIABLES[0]: "expandable_segments:True"}


def torchrun(world_size: int) -> list[str]:
    """The beginning of a command line that runs the rest of it as `world_size` ranks on this machine."""
    # --local-addr: by default torchrun uses the machine's name for the rendezvous, which may not resolve.
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
    """The variables that ranks on `device` (cpu or cuda) need in addition to the environment of their parent."""
    # megatron-core warns of every missing optional package, once per rank and module.
    quiet = {"PYTHONWARNINGS": "ignore::UserWarning,ignore::FutureWarning,ignore::DeprecationWarning"}
    if device == "cpu":
        # The ranks run in parallel: with a thread pool per rank they would compete for the same cores.
        loopback = "lo" if sys.platform.startswith("linux") else "lo0"
        return quiet | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": loopback}
    # megatron overlaps tensor-parallel communication with computation only if kernels start in launch order.
    return quiet | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}


def offload_threads(config: RunConfig, ranks: int, environment: Mapping[str, str]) -> dict[str, str]:
    """The number of threads for a machine's `ranks` that compute AdamW on the CPU (optimizer.cpu_offload); {} without.

    By default torchrun sets one thread per rank. Half of the CPUs are reserved for the servers' processes."""
    if config.device == "cpu" or not config.optimizer.cpu_offload or not ranks or "OMP_NUM_THREADS" in environment:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, usable_cpus() // (2 * ranks)))}


def usable_cpus() -> int:
    """The CPUs that this process may use: a job may have fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus_needed(config: RunConfig) -> tuple[int, int]:
    """The number of GPUs of the trainer and of the servers on this machine."""
    roles, server = roles_of(config), config.server
    trainer = config.parallel.world_size if config.device == "cuda" and "train" in roles else 0
    own_servers = "serve" in roles and not server.urls and server.engine != "reference"
    return trainer, server.count * server.tensor_parallel if server.device == "cuda" and own_servers else 0


def gpus_together(config: RunConfig, trainer: int, servers: int) -> int:
    """The number of GPUs of one machine on which the trainer has `trainer` and the servers have `servers` of them."""
    return max(trainer, servers) if config.server.takes_turns else trainer + servers


def gpu_shares(trainer: int, servers: int, environment: Mapping[str, str], in_turns: bool = False) -> tuple[str, str]:
    """CUDA_VISIBLE_DEVICES for this number of GPUs of the trainer and of the servers, "" without a GPU: disjoint, or
    the same ones `in_turns`."""
    given = environment.get("CUDA_VISIBLE_DEVICES")
    visible = given.split(",") if given else [str(index) for index in range(trainer + servers)]
    first = 0 if in_turns else trainer
    return ",".join(visible[:trainer]), ",".join(visible[first : first + servers])
