"""Checks of a node of a job before the expensive start; each line names setting and remedy."""

import os
import socket
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import psutil

from minpro_megatron.checkpoints.file_records import verify_files
from minpro_megatron.checkpoints.manifest import read_manifest
from minpro_megatron.checkpoints.resume_point import read_latest
from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import UserError
from minpro_megatron.fleet.open_files import limit_problem
from minpro_megatron.launch.node_roles import host_on_node, node_gpus, roles_on
from minpro_megatron.launch.preflight.gpu_count import compute_modes, count_gpus
from minpro_megatron.launch.preflight.gpu_software import c_compiler, driver_cuda_version, software_problems
from minpro_megatron.launch.preflight.problems import Problem, passes
from minpro_megatron.launch.preflight.run_checks import port_problems
from minpro_megatron.launch.preflight.shared_gpu_check import machine_memory_bytes, shared_gpu_problems
from minpro_megatron.launch.preflight.shared_memory_check import shared_memory_problems
from minpro_megatron.launch.roles import gpus_together
from minpro_megatron.launch.starts import Report
from minpro_megatron.launch.topology import NodeShare
from minpro_megatron.models.weight_files import weight_problem
from minpro_megatron.serving.addresses import is_loopback

# Memory that a driver and an idle desktop use; a process with a model uses far more.
FOREIGN_MEMORY_MIB = 2048
# Times of status, metrics and journal are compared across nodes.
MAX_CLOCK_SKEW_S = 5.0
_QUERY = ["nvidia-smi", "--query-gpu=index,memory.used,memory.total", "--format=csv,noheader,nounits"]


def node_problems(config: RunConfig, share: NodeShare, address: str, visible: str | None) -> list[Problem]:
    """One problem for each reason why this node cannot run its share. `visible`: CUDA_VISIBLE_DEVICES of the job."""
    needed, found = gpus_together(config, *node_gpus(config, share)), list[Problem]()
    if needed:
        found += gpu_problems(needed, present := count_gpus(), gpu_memory(), visible)
        if present:
            found += map(Problem, software_problems(driver_cuda_version(), c_compiler()))
            found += map(Problem, shared_gpu_problems(config, compute_modes(), share.ranks, machine_memory_bytes()))
    hosts = [host_on_node(host, address) for host in (config.server.host, config.collector.host)]
    servers = range(share.first_server, share.first_server + share.num_servers)
    found += port_problems(config, servers, hosts[0], hosts[1] if share.collects else "")
    if share.collects and (problem := limit_problem(config)):
        found.append(Problem(problem))
    found += map(Problem, shared_memory_problems(config) if share.ranks else [])
    missing = list(file_problems(files_needed(config, share), config.run_dir))
    return [*found, *missing, *([] if missing else weight_problems(config, share))]


def gpu_memory() -> list[tuple[int, int, int]]:
    """Index, used and total MiB of each GPU of this machine; empty if nvidia-smi does not report them."""
    try:
        text = subprocess.run(_QUERY, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_gpu_memory(text)


def parse_gpu_memory(text: str) -> list[tuple[int, int, int]]:
    """The lines `index, used, total`; lines of GPUs in an error state, which contain text, are skipped."""
    rows = [[field.strip() for field in line.split(",")] for line in text.splitlines()]
    numbers = [row for row in rows if len(row) == 3 and all(field.isdecimal() for field in row)]
    return [(int(index), int(used), int(total)) for index, used, total in numbers]


def gpu_problems(
    needed: int, present: int, memory: Sequence[tuple[int, int, int]], visible: str | None
) -> Iterator[Problem]:
    """Problems of too few GPUs, or of GPUs that other processes use. `visible`, as numbers, selects the GPUs."""
    names = visible.split(",") if visible else []
    if present < needed:
        line = (
            f"{needed} GPUs are needed and {present} usable: correct topology.gpus_per_node, ask for more GPUs in the "
            "profile, or exclude the node (slurm.exclude) if its GPUs are broken"
        )
        # The job was assigned enough GPUs on this node, so some of them do not work; another node may not have this
        # problem.
        yield Problem(line, is_transient=len(names) >= needed)
    looked_at = {int(name) for name in names} if names and all(name.isdecimal() for name in names) else None
    for index, used, total in memory:
        if used > FOREIGN_MEMORY_MIB and (looked_at is None or index in looked_at):
            line = (
                f"GPU {index}: {used} of {total} MiB are in use before the start: end the process that holds them "
                "(nvidia-smi shows it), or exclude the node (slurm.exclude)"
            )
            yield Problem(line, is_transient=True)


def files_needed(config: RunConfig, share: NodeShare) -> list[tuple[str, Path]]:
    """The files that roles with this share open, with the setting that names them."""
    roles = roles_on(config, share)
    files = [("model.hf_path", Path(config.model.hf_path) / "config.json")]
    if "train" in roles:
        files.append(("model.megatron_path", Path(config.model.megatron_path) / "manifest.json"))
    if "collect" in roles:
        files += [("data.train_file", Path(config.data.train_file))]
        files += [("data.heldout_file", Path(config.data.heldout_file))]
        files += [("evaluation.benchmarks", Path(benchmark.file)) for benchmark in config.evaluation.benchmarks]
    if config.debug.journal:
        files.append(("debug.journal", Path(config.debug.journal)))
    if config.data.demonstrations:
        files.append(("data.demonstrations", Path(config.data.demonstrations)))
    return files


def file_problems(files: Iterable[tuple[str, Path]], run_dir: Path) -> Iterator[Problem]:
    """A problem for each file that cannot be read here, and if the run folder cannot be written to."""
    for field, path in files:
        try:
            with path.open("rb") as file:
                file.read(1)
        except OSError as error:
            line = (
                f"{field} = {path}: {error.strerror}: put it on a file system that all nodes have, under the same "
                "path, and mount it into the container (container.mounts)"
            )
            yield Problem(line, passes(error))
    probe = run_dir / f".probe-{socket.gethostname()}-{os.getpid()}"
    try:
        probe.write_text("written")
        probe.unlink()
    except OSError as error:
        line = f"runs_dir: {run_dir} cannot be written to ({error.strerror}): choose another runs_dir, or mount it"
        yield Problem(line, passes(error))


def weight_problems(config: RunConfig, share: NodeShare) -> Iterator[Problem]:
    """A problem for weights that roles with this share load and that are missing or damaged here: those of the models
    and of the checkpoint from which the run resumes."""
    roles = roles_on(config, share)
    if "serve" in roles and (problem := weight_problem(Path(config.model.hf_path))):
        yield Problem(f"model.hf_path = {config.model.hf_path}: {problem}, or mount all of it")
    if "train" not in roles:
        return
    try:
        verify_files(config.model.megatron_path, read_manifest(config.model.megatron_path))
    except (OSError, UserError) as error:
        yield Problem(f"model.megatron_path = {config.model.megatron_path}: {error}", _is_passing(error))
    try:
        read_latest(config.run_dir)
    except (OSError, UserError) as error:
        yield Problem(f"the checkpoint to resume from: {error}", _is_passing(error))


def _is_passing(error: Exception) -> bool:
    return isinstance(error, OSError) and passes(error)


def clock_problems(reports: Sequence[Report]) -> Iterator[Problem]:
    """A problem for each node whose clock differs too much from the median."""
    if not reports:
        return
    middle = sorted(report.clock_s for report in reports)[len(reports) // 2]
    for report in reports:
        skew = report.clock_s - middle
        if abs(skew) > MAX_CLOCK_SKEW_S:
            line = (
                f"{node_name(report.node, report.host)}: its clock is {abs(skew):.1f} s "
                f"{'ahead of' if skew > 0 else 'behind'} the others', {MAX_CLOCK_SKEW_S:g} s at most are allowed: "
                "have its time service (chrony, ntpd) repaired, or exclude the node (slurm.exclude)"
            )
            yield Problem(line, is_transient=True)


def absence_problems(reports: Sequence[Report], num_nodes: int, waited_s: float, folder: Path) -> Iterator[Problem]:
    """A problem if reports of some nodes are missing."""
    present = {report.node for report in reports}
    if absent := [str(node) for node in range(num_nodes) if node not in present]:
        line = (
            f"node {', '.join(absent)}: nothing from it in {folder} after {waited_s:.0f} s: runs_dir must be on a file "
            "system that all nodes share; otherwise the node's task has not started"
        )
        yield Problem(line, is_transient=True)  # a container may have started late


def all_problems(reports: Sequence[Report], num_nodes: int, waited_s: float, folder: Path) -> list[Problem]:
    """All problems in the nodes' reports, each with the name of its node."""
    own = [problem.of(node_name(report.node, report.host)) for report in reports for problem in report.problems]
    return [*own, *clock_problems(reports), *absence_problems(reports, num_nodes, waited_s, folder)]


def node_name(node: int, host: str) -> str:
    return f"node {node} ({host})"


def routable_address(interface: str) -> tuple[str, str]:
    """An IPv4 address under which other machines reach this one, and its interface: that of `interface` if one is
    named, else that of this machine's name, else that of the default route. Raises ValueError."""
    addresses = interface_addresses()
    if interface:
        if interface not in addresses:
            known = ", ".join(f"{name} ({address})" for name, address in addresses.items())
            raise UserError(
                f"--interface {interface}: this node has no such interface with an IPv4 address; it has: {known}"
            )
        return addresses[interface], interface
    names = {address: name for name, address in addresses.items()}
    for look in (_address_of_own_name, _address_of_default_route):
        address = look()
        if address in names and not is_loopback(address):
            return address, names[address]
    raise UserError(
        "this node's name has no address that others could reach, and there is no default route: name the network "
        "interface in the profile (slurm.interface)"
    )


def interface_addresses() -> dict[str, str]:
    """The first IPv4 address of each network interface."""
    found: dict[str, str] = {}
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family == socket.AF_INET:
                found.setdefault(name, entry.address)
    return found


def _address_of_own_name() -> str:
    return _or_nothing(lambda: socket.gethostbyname(socket.gethostname()))


def _address_of_default_route() -> str:
    def look() -> str:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("198.51.100.1", 9))  # reserved for documentation; a datagram socket sends nothing here
            return probe.getsockname()[0]

    return _or_nothing(look)


def _or_nothing(look: Callable[[], str]) -> str:
    try:
        return look()
    except OSError:
        return ""
