"""A tiny model in both formats, made once, and runs of the whole system on it."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from minpro_megatron.__main__ import run_command

ROOT = Path(__file__).resolve().parents[2]
# Overrides of the demo: a run of small steps on one rank, with the engine that starts soonest.
SMALL_RUN = (
    "server.engine=reference",
    "staleness.delay_steps=1",
    "evaluation.num_prompts=2",
    "evaluation.samples_per_prompt=2",
    "batch.num_prompts=4",
    "batch.mini_batch_prompts=2",
    "batch.responses_per_prompt=4",
    "parallel.tensor=1",
    "parallel.expert=1",
    "checkpoint.every_steps=0",
)


@dataclass(frozen=True)
class TinyModel:
    hf: Path
    megatron: Path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Random weights: what is tested is that everything works together, not that anything is learnt."""
    folder = tmp_path_factory.mktemp("tiny_model")
    model = TinyModel(folder / "hf", folder / "megatron")
    _run("tiny-model", "--steps", 0, "--output", model.hf)
    convert(model)
    return model


def convert(model: TinyModel) -> None:
    """Makes the Megatron format of the Hugging Face one."""
    _run("convert", "to-megatron", "--hf", model.hf, "--output", model.megatron)


def with_weights(model: TinyModel, tensors: dict[str, torch.Tensor], folder: Path) -> TinyModel:
    """The model with other weights, in both formats in `folder`."""
    made = TinyModel(folder / "hf", folder / "megatron")
    shutil.copytree(model.hf, made.hf)
    save_file(tensors, made.hf / "model.safetensors", metadata={"format": "pt"})
    convert(made)
    return made


def _run(command: str, *arguments: object) -> None:
    """A command in this process, which has imported torch."""
    assert run_command(command, list(map(str, arguments)), f"minpro {command}") == 0


class Launch:
    """`python -m minpro_megatron launch recipes.demo:tiny_moe` on the tiny model, in its own run folder."""

    def __init__(self, model: TinyModel, runs_dir: Path, name: str, *overrides: str) -> None:
        self.run_dir = runs_dir / name
        settings = [f"name={name}", f"runs_dir={runs_dir}", f"model.hf_path={model.hf}"]
        # a busy test machine may start the server more slowly than the demo allows
        settings += [f"model.megatron_path={model.megatron}", "server.start_timeout_s=150", *overrides]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "minpro_megatron", "launch", "recipes.demo:tiny_moe", *settings],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait(self, timeout_s: float) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, output

    def wait_for(self, file: str, timeout_s: float) -> None:
        """Until `file` of the run folder is there and not empty."""
        deadline = time.monotonic() + timeout_s
        path = self.run_dir / file
        while not (path.is_file() and path.stat().st_size):
            assert self.process.poll() is None, f"the run ended before {file}:\n{self.wait(5)[1]}"
            assert time.monotonic() < deadline, f"no {file} within {timeout_s:g} s"
            time.sleep(0.2)

    def processes(self, *words: str) -> list[psutil.Process]:
        """Processes of this run: those with its folder and all `words` in their command line, or SGLang's on it."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = " ".join(process.info["cmdline"] or [])
            if str(self.run_dir) in line and all(word in line for word in words):
                found.append(process)
        return found

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.wait(30)


@pytest.fixture
def launches(tiny_model: TinyModel, tmp_path: Path) -> Iterator["Launcher"]:
    launcher = Launcher(tiny_model, tmp_path)
    yield launcher
    for launch in launcher.started:
        launch.end()


class Launcher:
    def __init__(self, model: TinyModel, runs_dir: Path) -> None:
        self._model = model
        self._runs_dir = runs_dir
        self.started: list[Launch] = []

    def __call__(self, name: str, *overrides: str) -> Launch:
        self.started.append(Launch(self._model, self._runs_dir, name, *overrides))
        return self.started[-1]
