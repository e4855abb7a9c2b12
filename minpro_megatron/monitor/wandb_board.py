"""Weights & Biases beside TensorBoard: an optional package, which is imported only if a run uses it.

No failure of it ends a run: the first one is logged, and nothing more is sent. `wandb` itself sends in a process of its
own and stores everything in the run folder, from where `wandb sync` can send it later.
"""

import importlib.util
import logging
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minpro_megatron.config.run import RunConfig
from minpro_megatron.files.replacement import replace_file
from minpro_megatron.metrics.declared import METRICS
from minpro_megatron.monitor.history import is_of_evaluations

log = logging.getLogger(__name__)

FOLDER, ID_FILE = "wandb", "wandb_run_id"  # in the run folder
STEP, VERSION = "global_step", "policy_version"  # the x axes: W&B's own steps cannot go back when a run resumes
_START_LIMIT_S, _END_LIMIT_S = 60.0, 60.0  # for servers that do not answer


def wandb_problems(config: RunConfig) -> Iterator[str]:
    """One line if the run is to write to Weights & Biases and cannot."""
    if config.wandb.enabled and importlib.util.find_spec("wandb") is None:
        yield (
            "wandb.enabled = true: the package wandb is not installed; install the version that pyproject.toml pins "
            "(pip install '.[wandb]'), or give wandb.enabled=false"
        )


class WandbBoard:
    """A `monitor.board.Board` that writes to one W&B run: a run that resumes continues the same."""

    def __init__(self, config: RunConfig) -> None:
        self._run: Any = None
        self._failed = False
        self._unless_it_fails(lambda: self._open(config))

    def scalars(self, step: int, metrics: Mapping[str, float], time_s: float) -> None:
        axis = VERSION if all(map(is_of_evaluations, metrics)) else STEP
        self._unless_it_fails(lambda: self._run.log({axis: step, **metrics}))

    def histogram(self, step: int, name: str, values: Any) -> None:
        self._distribution(step, name, lambda: np.histogram(np.asarray(values), bins=64))

    def counts(self, step: int, name: str, counts: np.ndarray, edges: np.ndarray) -> None:
        self._distribution(step, name, lambda: (counts, edges))

    def text(self, step: int, name: str, markdown: str) -> None:
        """Nothing: prompts and responses stay on this machine."""

    def close(self, failed: bool) -> None:
        self._unless_it_fails(lambda: self._run.finish(exit_code=int(failed)))

    def _open(self, config: RunConfig) -> None:
        import wandb

        config.run_dir.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=config.wandb.project,
            entity=config.wandb.entity,
            name=config.name,
            id=_run_id(config.run_dir),
            resume="allow",
            dir=str(config.run_dir),
            config=config.model_dump(mode="json"),
            tags=[config.objective.name],
            settings=wandb.Settings(
                console="off",  # the role has its own log
                silent=True,
                disable_git=True,  # environment.json has the commit
                disable_code=True,
                init_timeout=_START_LIMIT_S,
                finish_timeout=_END_LIMIT_S,
                finish_timeout_raises=True,
            ),
        )
        for area in sorted({name.partition("/")[0] for name in METRICS}):
            axis = VERSION if is_of_evaluations(f"{area}/") else STEP
            self._run.define_metric(f"{area}/*", step_metric=axis)

    def _distribution(self, step: int, name: str, make: Callable[[], tuple[np.ndarray, np.ndarray]]) -> None:
        def send() -> None:
            from wandb import Histogram

            self._run.log({STEP: step, f"{name}_histogram": Histogram(np_histogram=coarse(*make()))})

        self._unless_it_fails(send)

    def _unless_it_fails(self, action: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            action()
        except Exception as error:
            self._failed = True
            log.warning(
                "Weights & Biases failed, and the run continues without it: %s: %s; what was stored in %s of the run "
                "folder can be sent with `wandb sync`", type(error).__name__, error, FOLDER,
            )  # fmt: skip


def _run_id(run_dir: Path) -> str:
    """The id of the run folder's W&B run, which its first start chooses."""
    path = run_dir / ID_FILE
    if not path.exists():
        replace_file(path, secrets.token_hex(8) + "\n")
    return path.read_text(encoding="utf-8").strip()


def coarse(counts: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same distribution in at most 512 bins, the largest number that W&B accepts: neighbouring bins are joined."""
    joined = -(-len(counts) // 512)
    starts = np.arange(0, len(counts), joined)
    return np.add.reduceat(counts, starts), np.append(edges[starts], edges[-1])
