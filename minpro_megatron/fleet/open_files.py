"""How many files and connections the collector may have open at a time, and how many it needs.

Every group in flight is a connection, and with an environment every response of it, so 32 servers need more of them
than the usual soft limit of 1,024.
"""

import resource

from minpro_megatron.config.environment import PYTHON_TOOL
from minpro_megatron.config.run import RunConfig
from minpro_megatron.serving.endpoints import num_servers

# Journal, logs, the collector's own interface, libraries, route files being written.
BASE_FILES = 256
FILES_PER_REWARD_WORKER = 4
# The pipes to a process that runs code, or a connection to a sandbox service.
FILES_PER_TOOL_CALL = 4
# Episodes that wait for their tool give their places to others; when all of them continue, there are so many.
MOST_EPISODES_PER_PLACE = 2
# Checks of a server's version and health, and aborts.
OTHER_CONNECTIONS_PER_SERVER = 4
# The soft limit is raised at least to this value, if the hard limit allows it, as SGLang's servers do.
MIN_SOFT_LIMIT = 65536


def files_needed(config: RunConfig) -> int:
    """The maximum number of open files of a collector, or of the command `eval`."""
    sizes, requests = _group_sizes(config), config.server.max_requests_under_way
    if config.environment.enabled:
        connections = MOST_EPISODES_PER_PLACE * max(requests, *sizes)
    else:
        connections = max(1, requests // min(sizes))
    return _other_files(config) + num_servers(config.server) * connections


def _group_sizes(config: RunConfig) -> list[int]:
    """The sizes of the requested groups: training groups, and the groups into which evaluations are split."""
    size, evaluation = config.batch.responses_per_prompt, config.evaluation
    samples = [evaluation.samples_per_prompt, *(one.samples_per_prompt for one in evaluation.benchmarks)]
    return [size, *(count % size or size for count in samples)]


def _other_files(config: RunConfig) -> int:
    tool = config.environment.python_tool.workers if config.environment.name == PYTHON_TOOL else 0
    return (
        BASE_FILES
        + FILES_PER_TOOL_CALL * tool
        + FILES_PER_REWARD_WORKER * config.reward.workers
        + OTHER_CONNECTIONS_PER_SERVER * num_servers(config.server)
    )


def file_limits() -> tuple[int, int]:
    """(soft, hard) limit of this process on open files."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def raise_file_limit(config: RunConfig) -> None:
    """Raises this process's soft limit to what `config` needs or more, or as far as the hard limit allows."""
    soft, hard = file_limits()
    wanted = min(max(files_needed(config), MIN_SOFT_LIMIT), hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def max_groups_under_way(config: RunConfig) -> int | None:
    """The number of groups in flight, over all servers, for which this process's soft limit is enough. None means that
    the servers' own limits apply."""
    soft, _ = file_limits()
    if soft >= files_needed(config):
        return None
    # A connection stays open for seconds after its answer, so connections of finished groups count too.
    per_group = max(_group_sizes(config)) if config.environment.enabled else 1
    return max(1, (soft - _other_files(config)) // (2 * per_group))


def limit_problem(config: RunConfig) -> str | None:
    """The message of a preflight check; None if the hard limit is high enough."""
    needed, (_, hard) = files_needed(config), file_limits()
    if hard >= needed:
        return None
    return (
        f"the hard limit on open files (ulimit -Hn) = {hard} must be at least {needed} for "
        f"{num_servers(config.server)} servers with up to {config.server.max_requests_under_way} requests each: raise "
        "it (nofile in /etc/security/limits.conf, LimitNOFILE of a systemd unit), or lower server.max_running_requests"
    )
