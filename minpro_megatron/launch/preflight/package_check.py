"""Checks that the packages of extras which a run's roles import are installed."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec

from minpro_megatron.config.run import RunConfig
from minpro_megatron.launch.roles import roles_of
from minpro_megatron.missing_packages import not_installed


def package_problems(config: RunConfig, is_installed: Callable[[str], bool] | None = None) -> Iterator[str]:
    """A line for each missing package. `is_installed` says it of a module; by default this environment is looked at."""
    installed = is_installed or (lambda name: find_spec(name) is not None)
    yield from (not_installed(name) for name in _imported(config) if not installed(name))


def _imported(config: RunConfig) -> list[str]:
    roles, own_servers = roles_of(config), not config.server.urls
    names = ["torch", "megatron", "matplotlib", "tensorboard"] if "train" in roles else []
    if "serve" in roles and own_servers:
        names.append("sglang" if config.server.engine == "sglang" else "torch")
    return list(dict.fromkeys(names))
