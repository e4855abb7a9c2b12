"""The share of a global step that monitoring takes: token statistics, merging them over ranks, writing, alarms.

    python -m benchmarks.monitoring [--run RUN_DIR | --hidden-size N] [--steps 30]

Trains on the journal of a finished run of recipes.demo (made with collector.journal_keep_steps=0; without --run one
is launched first) in this process, on one rank, and times the parts where they are called. All times are processor
time, so that other load of the machine does not matter. The tiny model is the worst case: monitoring a token costs the
same for any model, and here the rest of a step is cheapest. --hidden-size launches the run with a wider model of random
weights instead.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minpro_megatron.config.run import RunConfig, with_overrides

ROOT = Path(__file__).resolve().parent.parent
PARTS = {
    "statistics of tokens": ("minpro_megatron.actor.loss", "token_statistics"),
    "to the host, by micro-batch": ("minpro_megatron.actor.policy", "as_metrics"),
    "memory of the rank": ("minpro_megatron.train", "rank_memory"),
    "merging metrics": ("minpro_megatron.train", "merge"),
    "merging histograms": ("minpro_megatron.train", "merge_histograms"),
    "metrics of the batch": ("minpro_megatron.train", "batch_metrics"),
}
WRITING = "files, TensorBoard, alarms"
STEPS = "all of the steps"


def timed(function: Callable, name: str, seconds: dict[str, float]) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.thread_time()
        result = function(*args, **kwargs)
        seconds[name] += time.thread_time() - start
        return result

    return call


def train_with_clocks(config: RunConfig) -> dict[str, float]:
    """Runs the trainer on one rank here. Returns the seconds of each part, and of all steps, but for the first one,
    which makes what later ones use."""
    import importlib

    from minpro_megatron.monitor.step_report import StepReport
    from minpro_megatron.roles import train

    seconds: dict[str, float] = defaultdict(float)
    for name, (module, function) in PARTS.items():
        holder = importlib.import_module(module)
        setattr(holder, function, timed(getattr(holder, function), name, seconds))
    write = timed(StepReport.step, WRITING, seconds)
    ends: list[float] = []

    def step(*args: Any, **kwargs: Any) -> Any:
        result = write(*args, **kwargs)
        if not ends:
            seconds.clear()
        ends.append(time.process_time())
        return result

    StepReport.step = step
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}
    config.run_dir.mkdir(parents=True)
    if train.run(config, incarnation=0) != 0:
        raise SystemExit("the trainer failed; its line is above")
    return dict(seconds) | {STEPS: ends[-1] - ends[0]}


def launched(folder: str, steps: int, hidden_size: int | None) -> Path:
    settings = [f"runs_dir={folder}", "name=source", f"num_global_steps={steps}", "collector.journal_keep_steps=0"]
    settings += ["server.start_timeout_s=600", "evaluation.num_prompts=1"]
    if hidden_size is not None:
        hf, megatron = f"{folder}/hf", f"{folder}/megatron"
        made = ["--steps", "0", "--hidden-size", str(hidden_size), "--output", hf]
        _run([sys.executable, "tools/make_tiny_model.py", *made])
        _run([sys.executable, "tools/convert_checkpoint.py", "to-megatron", "--hf", hf, "--output", megatron])
        settings += [f"model.hf_path={hf}", f"model.megatron_path={megatron}"]
    _run([sys.executable, "-m", "minpro_megatron", "launch", "recipes.demo:tiny_moe", *settings])
    return Path(folder) / "source"


def _run(command: list[str]) -> None:
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--run", type=Path, help="folder of the run whose journal is trained on")
    source.add_argument("--hidden-size", type=int, help="of the model of the run that is launched; default: the demo's")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = options.run or launched(folder, options.steps, options.hidden_size)
        config = with_overrides(
            RunConfig.from_json((run / "run.json").read_text()),
            [
                f"runs_dir={folder}", "name=clocked", f"num_global_steps={options.steps}", f"debug.journal={run}",
                "parallel.tensor=1", "parallel.expert=1", "checkpoint.every_steps=0",
            ],
        )  # fmt: skip
        seconds = train_with_clocks(config)
    count, whole = options.steps - 1, seconds.pop(STEPS)
    print(f"{count} global steps of {whole / count:.3f} s processor time\n")
    print("| part | ms a step | share of the step |\n|---|---|---|")
    total = sum(seconds.values())
    for name, spent in [*sorted(seconds.items(), key=lambda pair: -pair[1]), ("all of it", total)]:
        print(f"| {name} | {1000 * spent / count:.2f} | {100 * spent / whole:.2f} % |")


if __name__ == "__main__":
    main()
