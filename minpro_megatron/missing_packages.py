"""The message for a package that is not installed because no extra of pyproject.toml was asked for that brings it."""

import sys

# By the module that is imported: the extra with its package. `pip install .` alone installs none of them.
EXTRAS = {
    "invoke": "cluster",
    "kubernetes": "kubernetes",
    "matplotlib": "train",
    "megatron": "train",
    "nemo_run": "cluster",
    "sglang": "serve",
    "sky": "skypilot",
    "tensorboard": "train",
    "torch": "train",
    "torchx": "cluster",
    "transformer_engine": "train",
    "transformer_engine_torch": "train",
    "wandb": "wandb",
}
_ON_CPUS = {"matplotlib", "megatron", "tensorboard", "torch"}  # the extra `cpu` has them too


def missing_package(error: ModuleNotFoundError) -> str | None:
    """The line of `not_installed` for the package that was imported; None if no extra brings it."""
    name = (error.name or "").partition(".")[0]
    return not_installed(name) if name in EXTRAS else None


def not_installed(name: str) -> str:
    """One line: the package, the environment that lacks it, and how it is installed."""
    install = f"pip install '.[{EXTRAS[name]}]'" + (" (without a GPU '.[cpu]')" if name in _ON_CPUS else "")
    return (
        f"the package {name} is not installed in {sys.prefix}; in a checkout of this project, {install} installs it, "
        "and make setup makes an environment with all packages"
    )
