"""All checks of a run that are possible before a process starts, reported together."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from minpro_megatron.checkpoints.manifest import is_run_checkpoint
from minpro_megatron.checkpoints.run_checkpoint import is_exported_from
from minpro_megatron.config.model import layer_backend_of, recomputed_modules
from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import UserError
from minpro_megatron.evaluation.in_run import load_benchmarks
from minpro_megatron.feed.demonstration_feed import demonstration_problems
from minpro_megatron.feed.journal_feed import journal_problems
from minpro_megatron.files.disk_space import existing_parent, free_bytes
from minpro_megatron.fleet.open_files import limit_problem
from minpro_megatron.launch.preflight.backend_check import layer_backend_problems, recomputation_warnings
from minpro_megatron.launch.preflight.environment_check import environment_problems
from minpro_megatron.launch.preflight.gpu_count import compute_modes, count_gpus
from minpro_megatron.launch.preflight.gpu_software import c_compiler, driver_cuda_version, software_problems
from minpro_megatron.launch.preflight.hook_check import hook_problems
from minpro_megatron.launch.preflight.length_check import length_problems
from minpro_megatron.launch.preflight.library_checks import megatron_field_problems, server_argument_problems
from minpro_megatron.launch.preflight.package_check import package_problems
from minpro_megatron.launch.preflight.problems import Problem, passes
from minpro_megatron.launch.preflight.prompt_checks import data_problems
from minpro_megatron.launch.preflight.reward_check import reward_problems
from minpro_megatron.launch.preflight.shared_gpu_check import machine_memory_bytes, shared_gpu_problems
from minpro_megatron.launch.preflight.shared_memory_check import shared_memory_problems
from minpro_megatron.launch.preflight.stop_tokens import stop_token_warnings
from minpro_megatron.launch.preflight.template_date import date_warnings
from minpro_megatron.launch.resume import foreign_entries, holds_a_run, obstacles
from minpro_megatron.launch.roles import gpus_needed, gpus_together, roles_of
from minpro_megatron.models.architecture import read_architecture, refuse_uneven_cuts
from minpro_megatron.models.text_files import text_files
from minpro_megatron.models.weight_files import weight_problem
from minpro_megatron.monitor.wandb_board import wandb_problems
from minpro_megatron.planning.routes import route_file_bytes
from minpro_megatron.planning.workload import Workload, batch_of
from minpro_megatron.prompts.prompts import load_prompts, select_prompts
from minpro_megatron.records import Prompt
from minpro_megatron.serving.addresses import is_loopback
from minpro_megatron.serving.api_key import given_api_key
from minpro_megatron.serving.ports import listening_error
from minpro_megatron.serving.watched_server import external_urls

_SPARE_BYTES = 512 * 1024**2  # logs, TensorBoard files and the journal of a short run


Check = Callable[[RunConfig], Iterable[str]]


def problems(config: RunConfig) -> list[str]:
    """One line for each problem that would stop this run on this machine: setting, value, rule and remedy."""
    found = [*package_problems(config), *run_problems(config), *_ports(config), *_gpus(config), *_open_files(config)]
    return [*found, *(shared_memory_problems(config) if "train" in roles_of(config) else [])]


def run_problems(config: RunConfig) -> list[str]:
    """The `problems` that are the same on every machine with access to the run's files."""
    roles = roles_of(config)
    checks: list[Check] = [_steps, _hf_model, length_problems]
    if "train" in roles:
        checks += [_mesh_fits_model, _megatron_model, layer_backend_problems, megatron_field_problems, wandb_problems]
    checks += [data_problems] if config.samples_responses else [_replaced_rollouts]
    checks += [reward_problems, environment_problems] if "collect" in roles else []
    checks += [hook_problems]
    checks += [_servers, server_argument_problems] if "serve" in roles else []
    checks += [_run_folder, _disk_space]
    return [problem for check in checks for problem in check(config)]


def _replaced_rollouts(config: RunConfig) -> Iterable[str]:
    """Problems of what the run trains on in place of rollouts of its own."""
    return demonstration_problems(config) if config.data.demonstrations else journal_problems(config)


def warnings(config: RunConfig) -> list[str]:
    """One line for each probable mistake that does not stop a run. Requires that there are no `run_problems`."""
    roles, checks = roles_of(config), list[Check]()
    checks += [recomputation_warnings] if "train" in roles else []
    if "collect" in roles:
        checks += [_shared_prompts, stop_token_warnings, date_warnings, _open_servers]
    return [warning for check in checks for warning in check(config)]


def _open_servers(config: RunConfig) -> Iterator[str]:
    """External servers without an API key: anyone with access to their port can use them and replace their weights."""
    server = config.server
    hosts = [urlsplit(url).hostname or "" for url in server.urls]
    if not server.api_key_variable and (others := [host for host in hosts if not is_loopback(host)]):
        yield (
            f"server.urls: {', '.join(others)} without an API key: anyone with access to such a server's port can use "
            "it and replace its weights; start it with --api-key and name the environment variable that holds the key "
            "in server.api_key_variable"
        )


def _shared_prompts(config: RunConfig) -> Iterator[str]:
    """Prompts that are both evaluated and trained on."""
    data = config.data
    training = select_prompts(load_prompts(data.train_file, "data.train_file"), data)
    trained = {_question(prompt) for prompt in training}
    heldout = load_prompts(data.heldout_file, "data.heldout_file")[: config.evaluation.num_prompts]
    evaluated = {f"data.heldout_file = {data.heldout_file}": heldout}
    for benchmark, prompts in zip(config.evaluation.benchmarks, load_benchmarks(config), strict=True):
        evaluated[f"evaluation.benchmarks {benchmark.name}, file {benchmark.file}"] = prompts
    for field, prompts in evaluated.items():
        if shared := sum(_question(prompt) in trained for prompt in prompts):
            yield (
                f"{field}: {shared} of its {len(prompts)} prompts are also in data.train_file = {data.train_file}: "
                "scores on them are not held-out scores; remove them from one of the two files"
            )


def _question(prompt: Prompt) -> str:
    """Equal for prompts that differ in white space only."""
    return " ".join(prompt.text.split())


def _hf_model(config: RunConfig) -> Iterator[str]:
    folder, field = Path(config.model.hf_path), f"model.hf_path = {config.model.hf_path}"
    if not folder.is_dir():
        yield f"{field}: no such folder; give a Hugging Face model folder (a hub id has to be downloaded first)"
        return
    if not (folder / "config.json").is_file():
        yield f"{field}: config.json is missing; give a folder in Hugging Face format"
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        yield f"{field}: the tokenizer is missing; copy tokenizer.json and tokenizer_config.json into it"
    if problem := weight_problem(folder):
        yield f"{field}: {problem}"
    try:
        text_files(folder)  # they are copied to the trained weights at the end of the run
    except UserError as error:
        yield f"{field}: {error}"


def _mesh_fits_model(config: RunConfig) -> Iterator[str]:
    if not (Path(config.model.hf_path) / "config.json").is_file():
        return  # already reported
    model = config.model
    fused = layer_backend_of(model.backend, config.device, model.dtype) == "transformer_engine"
    try:
        architecture = read_architecture(model.hf_path)
        refuse_uneven_cuts(architecture, config.parallel)
        recomputed_modules(model.recompute_modules, fused, architecture.num_experts > 0)
    except UserError as error:
        yield str(error)


def _megatron_model(config: RunConfig) -> Iterator[str]:
    folder, field = Path(config.model.megatron_path), f"model.megatron_path = {config.model.megatron_path}"
    if not folder.is_dir():
        yield f"{field}: there is no such folder; make it from model.hf_path with `minpro convert`"
    elif not (folder / "manifest.json").is_file():
        yield f"{field}: manifest.json is missing; run `minpro convert` to its end"
    elif is_run_checkpoint(folder):
        if not is_exported_from(Path(config.model.hf_path), folder):
            yield (
                f"{field}: a run's checkpoint, and model.hf_path = {config.model.hf_path} was not exported from it, so "
                "trainer and servers would start with different weights; write it with `minpro export` and give its "
                "output as model.hf_path"
            )
    elif _newest(Path(config.model.hf_path)) > (folder / "manifest.json").stat().st_mtime:
        # The trainer loads one and the servers the other: every ratio of the first steps would be wrong.
        yield (
            f"{field}: older than the weights in model.hf_path = {config.model.hf_path}; run "
            f"`minpro convert` again, or touch {folder / 'manifest.json'} if they are the same weights"
        )


def _newest(folder: Path) -> float:
    """The time of the last change to a weight file, 0 without one."""
    return max((path.stat().st_mtime for path in folder.glob("*.safetensors")), default=0.0)


def _run_folder(config: RunConfig) -> Iterator[str]:
    if config.run_dir.exists() and not config.run_dir.is_dir():
        yield f"runs_dir/name = {config.run_dir}: this is a file; choose another name=..."
    elif holds_a_run(config.run_dir):
        yield from obstacles(config)
    elif found := foreign_entries(config.run_dir):
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        yield (
            f"runs_dir/name = {config.run_dir}: it contains files that no run of this program wrote "
            f"({', '.join(found[:3])}{more}); choose another name=..., or move them elsewhere"
        )
    parent = existing_parent(config.run_dir)
    if not os.access(parent, os.W_OK):
        yield f"runs_dir = {config.runs_dir}: {parent} cannot be written to; choose another runs_dir=..."


def _steps(config: RunConfig) -> Iterator[str]:
    steps, staleness = config.num_global_steps, config.staleness
    if staleness.mode == "delay" and staleness.delay_steps > steps:
        yield (
            f"staleness.delay_steps = {staleness.delay_steps}: the run has num_global_steps = {steps}, so every step "
            "would train on rollouts of the initial weights; lower the delay, or raise num_global_steps"
        )


def _servers(config: RunConfig) -> Iterator[str]:
    looks: list[Callable[[], object]] = [lambda: given_api_key(config.server), lambda: external_urls(config.server)]
    for look in looks:
        try:
            look()
        except UserError as error:
            yield str(error)


def _ports(config: RunConfig) -> Iterator[str]:
    """Problems of ports; a run on a journal has neither collector nor servers and therefore no ports."""
    if "collect" in roles_of(config):
        servers = range(0 if config.server.urls else config.server.count)
        found = port_problems(config, servers, config.server.host, config.collector.host)
        yield from (problem.line for problem in found)


def port_problems(config: RunConfig, servers: range, server_host: str, collector_host: str) -> Iterator[Problem]:
    """A problem for each port that the settings give to one of these servers, or to the collector ("": not on this
    machine), and that is not available here."""
    server, collector = config.server, config.collector
    wanted = {}
    if server.first_port:
        for index in servers:
            wanted[server.first_port + index] = (server_host, f"server.first_port = {server.first_port}")
    if collector_host and collector.port in wanted:
        yield Problem(f"collector.port = {collector.port}: a server uses it; choose another, or 0 for any free port")
    elif collector_host and collector.port:
        wanted[collector.port] = (collector_host, f"collector.port = {collector.port}")
    for port, (host, field) in wanted.items():
        if error := listening_error(host, port):
            why = error.strerror or error
            line = f"{field}: cannot listen on {host}:{port} ({why}); choose another, or 0 for any free one"
            yield Problem(line, passes(error))


def _open_files(config: RunConfig) -> Iterator[str]:
    if "collect" in roles_of(config) and (problem := limit_problem(config)):
        yield problem


def _gpus(config: RunConfig) -> Iterator[str]:
    trainer, servers = gpus_needed(config)
    if trainer + servers == 0:
        return
    present = count_gpus()
    if present == 0:
        fields = [name for name, count in (("device", trainer), ("server.device", servers)) if count]
        remedy = " ".join(f"{field}=cpu" for field in fields)
        yield f"{' and '.join(fields)} = cuda: no usable NVIDIA GPU on this machine; set {remedy}"
    elif present < (needed := gpus_together(config, trainer, servers)):
        yield (
            f"parallel's world size {trainer} and server.count x server.tensor_parallel {servers}, with "
            f"server.placement = {config.server.placement}, need {needed} GPUs: {present} visible; lower one of them"
        )
    if present:
        yield from software_problems(driver_cuda_version(), c_compiler())
        yield from shared_gpu_problems(config, compute_modes(), trainer, machine_memory_bytes())


def _disk_space(config: RunConfig) -> Iterator[str]:
    model = Path(config.model.hf_path)
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors")) if model.is_dir() else 0
    needed = 2 * weights + _SPARE_BYTES  # the trained weights, written once next to a temporary copy
    settings = config.checkpoint
    if (
        settings.saves_before_end or settings.at_end
    ):  # each also holds float32 weights and two moments; one is being written
        float32_bytes = weights * (2 if config.model.dtype == "bfloat16" else 1)
        needed += (settings.keep_last + settings.keep_best + 1) * (weights + 3 * float32_bytes)
    routes, of_it = _route_files(config), ""
    if routes:
        needed += routes
        replayed = {
            "the servers' routes (model.routing_replay = rollout)": config.model.routing_replay == "rollout",
            f"kept ids (sampling.top_k = {config.sampling.top_k})": config.sampling.top_k > 0,
        }
        of_it = f", {routes / 1e9:.1f} GB of it for {' and '.join(name for name, used in replayed.items() if used)}"
    free = free_bytes(config.run_dir)
    if free < needed:
        yield (
            f"runs_dir = {config.runs_dir}: {free / 1e9:.1f} GB free, about {needed / 1e9:.1f} GB needed{of_it}; "
            "free some space or choose another runs_dir=..."
        )


def _route_files(config: RunConfig) -> int:
    """Bytes of the servers' routes and kept ids, with the planner's assumption about the length of responses."""
    if "collect" not in roles_of(config):
        return 0
    try:
        architecture = read_architecture(config.model.hf_path)
    except ValueError:  # already reported
        return 0
    return route_file_bytes(config, architecture, batch_of(config, Workload.of(config)).tokens)
