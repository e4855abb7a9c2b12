"""The message for a package that is not installed: the environment is not the project's, or lacks an extra."""

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
# Those that `pip install .` installs.
REQUIRED = {
    "aiohttp", "huggingface_hub", "jinja2", "math_verify", "msgspec", "numpy", "psutil", "pyarrow", "pydantic",
    "requests", "rich", "safetensors", "tokenizers", "transformers",
}  # fmt: skip
_ON_CPUS = {"matplotlib", "megatron", "tensorboard", "torch"}  # the extra `cpu` has them too


def missing_package(error: ModuleNotFoundError) -> str | None:
    """The line of `not_installed` for the package that was imported; None if it is not one that this project uses."""
    name = (error.name or "").partition(".")[0]
    return not_installed(name) if name in EXTRAS or name in REQUIRED else None


def not_installed(name: str) -> str:
    """One line: the package, the environment that lacks it, and what to do."""
    lacking = f"the package {name} is not installed in {sys.prefix}"
    if name in REQUIRED:
        return f"{lacking}; activate the environment that make setup has made, or install this project with pip"
    install = f"pip install '.[{EXTRAS[name]}]'" + (" (without a GPU '.[cpu]')" if name in _ON_CPUS else "")
    return (
        f"{lacking}; in a checkout of this project, {install} installs it, and make setup makes an environment with "
        "all packages"
    )
