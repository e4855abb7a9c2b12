"""A full step through the collector, from answers of synthetic servers to journal and trainer; and each stage alone.

    python -m benchmarks.collector_load [--responses 4096] [--max-tokens 20480] [--steps 1] [--delay 0] [--folder DIR]

Processes: synthetic servers (benchmarks/synthetic_servers.py), the unchanged role `collect`, a trainer that computes
nothing but keeps train.py's order of requests, and an event loop that only measures how late the machine wakes it.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import requests
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from benchmarks.collector_process import peak_bytes, run_bare_loop, run_collector, watch_peak
from benchmarks.collector_stages import measure_stages
from benchmarks.synthetic_servers import STOP_TOKEN, VOCABULARY_SIZE, response_lengths, synthetic_servers
from minpro_megatron.buffer.step_order import Fetch, Publish, Save, StepOrder, Train, steps_ahead
from minpro_megatron.config.run import RunConfig
from minpro_megatron.feed.feed import Feed
from minpro_megatron.records import Batch, BehaviorLogProbs, PublishLease, ServerAddress, TrainedStep

RESPONSES_PER_PROMPT = 8
# Tokens per second of 64 H100 that generate rollouts of Qwen3-30B-A3B; the derivation is in collector_load.md.
FLEET_TOKENS_PER_S = 106_000


def make_run(root: Path, arguments: argparse.Namespace) -> RunConfig:
    """A model folder without weights, prompts, and settings for `arguments.steps` global steps."""
    folder = root / "hf"
    folder.mkdir(parents=True)
    facts = {"vocab_size": VOCABULARY_SIZE, "max_position_embeddings": 40960, "eos_token_id": STOP_TOKEN}
    (folder / "config.json").write_text(json.dumps(facts))
    make_tokenizer().save(str(folder / "tokenizer.json"))
    rows = ({"id": f"p{n}", "source": "none", "prompt": f"{n} + 1 = " * 20, "answer": str(n + 1)} for n in range(2000))
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    num_prompts = arguments.responses // RESPONSES_PER_PROMPT
    return RunConfig.model_validate(
        {
            "name": "load",
            "runs_dir": str(root / "runs"),
            "num_global_steps": max(1, arguments.steps),
            "device": "cpu",
            "model": {"hf_path": str(folder), "megatron_path": "unused", "dtype": "float32"},
            "data": {name: str(root / "prompts.jsonl") for name in ("train_file", "heldout_file")},
            "publish": {"at_start": False},
            "batch": {
                "num_prompts": num_prompts,
                "responses_per_prompt": RESPONSES_PER_PROMPT,
                "mini_batch_prompts": num_prompts,
            },
            "sampling": {"max_response_tokens": arguments.max_tokens},
            "staleness": {"delay_steps": arguments.delay},
            "server": {"count": arguments.servers, "device": "cpu", "dtype": "float32"},
            "evaluation": {"num_prompts": 1, "samples_per_prompt": 1},
        }
    )


def make_tokenizer() -> Tokenizer:
    """As many tokens as Qwen3's, of 1 to 8 letters: the cost of decoding responses depends on both."""
    random = np.random.default_rng(0)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: place for place, letter in enumerate(letters)}
    while len(vocabulary) < STOP_TOKEN:
        for length in random.integers(2, 9, STOP_TOKEN - len(vocabulary)):
            vocabulary.setdefault("".join(map(chr, random.integers(97, 123, length))), len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    return tokenizer


class Trainer:
    """Rank 0's requests to the collector, in the order of a run, with the start and end time of each request."""

    def __init__(self, config: RunConfig, servers: Sequence[ServerAddress]) -> None:
        self._config, self._servers = config, servers
        self._feed = Feed(config.run_dir, 0)
        self._ready: dict[int, Batch] = {}
        self.phases: list[tuple[str, float, float]] = []

    def run(self) -> None:
        order = StepOrder(self._config.num_global_steps, steps_ahead(self._config.staleness))
        with self._phase("start"):
            self._feed.start(0)
        for fetch in order.before_first_step():
            self._fetch(fetch.batch, fetch.version)
        for step in order.steps:
            for event in order.of_step(step):
                match event:
                    case Fetch(batch, version):
                        self._fetch(batch, version)
                    case Train():
                        self._consume(step)
                    case Publish(version):
                        self._publish(version)
                    case Save(version):
                        with self._phase("flush"):
                            self._feed.checkpoint_begin(version)
                        self._feed.checkpoint_end(version)
        self._feed.finish()
        self._feed.close()

    def _consume(self, step: int) -> None:
        batch = self._ready.pop(step)
        trained = TrainedStep(step=step, policy_version=step, log_probs=_log_probs(batch))
        with self._phase("consumed"):
            self._feed.consumed(trained)

    def _fetch(self, index: int, version: int) -> None:
        with self._phase("collect and fetch"):
            batch = self._feed.batch(index)
        with self._phase("fetch again"):  # the batch is already there: measures only the transfer
            batch = self._feed.batch(index)
        assert isinstance(batch, Batch)
        scores = BehaviorLogProbs(
            index=index,
            policy_version=version,
            log_probs=_log_probs(batch),
        )
        with self._phase("scored"):
            self._feed.scored(scores)
        self._ready[index] = batch

    def _publish(self, version: int) -> None:
        with self._phase("wait to publish"):  # in delay mode until a batch is sampled
            lease = self._feed.publish_begin(version)
        assert isinstance(lease, PublishLease)
        assert lease.version == version
        for server in self._servers:
            requests.post(f"{server.url}/weight_version/{version}", timeout=60).raise_for_status()
        self._feed.publish_end(version, [server.index for server in self._servers])

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.phases.append((name, start, time.monotonic()))


def _log_probs(batch: Batch) -> list[list[np.ndarray]]:
    return [[response.rollout_log_probs - np.float32(0.25) for response in g.responses] for g in batch.groups]


def measure_step(config: RunConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole path: phases by name, stalls, memory and processor time of the collector."""
    context = multiprocessing.get_context("spawn")
    folder = config.run_dir
    folder.mkdir(parents=True)
    ended = context.Event()
    with synthetic_servers(folder, arguments.servers, arguments.server_processes, arguments.max_tokens) as servers:
        collector = context.Process(target=run_collector, args=(config, folder / "collector.json"))
        bare = context.Process(target=run_bare_loop, args=(folder / "bare.json", ended))
        for process in (collector, bare):
            process.start()
        try:
            trainer = Trainer(config, servers)
            start_bytes = peak_bytes(collector.pid or 0)
            peaks: list[int] = []
            watching = threading.Thread(target=watch_peak, args=(collector, peaks), daemon=True)
            watching.start()
            trainer.run()
            collector.join()
            watching.join()
        finally:
            ended.set()
            collector.terminate()
            bare.join()
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("collector", "bare")}
    return {
        "phases": trainer.phases,
        "stalls": found["collector"]["stalls"],
        "bare_stalls": found["bare"]["stalls"],
        "threads": found["collector"]["threads"],
        "bare_threads": found["bare"]["threads"],
        "start_bytes": start_bytes,
        "peak_bytes": peaks[-1],
        "journal_bytes": (folder / "journal.sqlite").stat().st_size,
        "load": os.getloadavg()[0],
    }


def worst(stalls: Sequence[Sequence[float]], phases: Sequence[tuple[str, float, float]]) -> float:
    return max((late for at, late in stalls if any(b <= at + late and at <= e for _, b, e in phases)), default=0.0)


def cpu_after(samples: Sequence[tuple[float, dict[str, float]]], begin: float) -> dict[str, float]:
    """CPU seconds of each thread and process, and of the whole collector, from `begin` to its last sample."""
    last: dict[str, float] = {}
    for _, times in samples:
        last |= times
    first = next((times for at, times in samples if at >= begin), samples[-1][1])
    return {name: seconds - first.get(name, 0.0) for name, seconds in last.items()}


def show_step(found: dict[str, Any], num_tokens: int, num_responses: int, console: Console) -> None:
    names = ("phase", "times", "median s", "tokens/s", "of 10 x fleet", "longest stall ms", "bare loop ms")
    table = Table(*names, box=MARKDOWN)
    phases = found["phases"]
    alone = {
        name: np.median([e - b for n, b, e in phases if n == name]) for name in dict.fromkeys(p[0] for p in phases)
    }
    for name, seconds in alone.items():
        own = [phase for phase in phases if phase[0] == name]
        rate = num_tokens / seconds
        table.add_row(
            name, str(len(own)), f"{seconds:.2f}", f"{rate:,.0f}", f"{rate / FLEET_TOKENS_PER_S / 10:.2f}",
            f"{1000 * worst(found['stalls'], own):.0f}", f"{1000 * worst(found['bare_stalls'], own):.0f}",
        )  # fmt: skip
    console.print(table)
    collecting = alone["collect and fetch"] - alone["fetch again"]
    begin, end = phases[0][2], phases[-1][2]
    steps = sum(name == "consumed" for name, _, _ in phases)
    for label, seconds, count in (("collected", collecting, 1), ("the whole way", end - begin, steps)):
        rate = count * num_tokens / seconds
        console.print(
            f"{label}: {seconds:.1f} s, {rate:,.0f} tokens/s, {count * num_responses / seconds:.0f} responses/s, "
            f"{rate / FLEET_TOKENS_PER_S:.1f} x the fleet"
        )
    cpu = {name: 1e6 * value / (steps * num_tokens) for name, value in cpu_after(found["threads"], begin).items()}
    used = ", ".join(f"{name} {value:.2f}" for name, value in sorted(cpu.items(), key=lambda item: -item[1]))
    console.print(f"microseconds of CPU per token since the start: {used}")
    beating = 1e6 * cpu_after(found["bare_threads"], begin)["MainThread"] / (steps * num_tokens)
    console.print(f"  of MainThread, the benchmark's own heartbeat: about {beating:.2f}")
    console.print(
        f"collector's memory: {found['start_bytes'] / 2**30:.2f} GiB at the start, {found['peak_bytes'] / 2**30:.2f} "
        f"GiB at most; journal {found['journal_bytes'] / 2**30:.2f} GiB; load {found['load']:.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=4096)
    parser.add_argument("--max-tokens", type=int, default=20480)
    parser.add_argument("--steps", type=int, default=1, help="0: the stages only")
    parser.add_argument("--delay", type=int, default=0, help="staleness.delay_steps")
    parser.add_argument("--servers", type=int, default=16)
    parser.add_argument("--server-processes", type=int, default=2)
    parser.add_argument("--stage-groups", type=int, default=64, help="groups for each stage alone; 0: no stages")
    parser.add_argument("--repeats", type=int, default=5, help="of the stages")
    parser.add_argument("--folder", type=Path, help="make the files below this folder (default: the temporary one)")
    parser.add_argument("--json", type=Path, help="write all measurements here too")
    arguments = parser.parse_args()
    if arguments.responses % RESPONSES_PER_PROMPT:
        parser.error(f"--responses {arguments.responses} must be a multiple of {RESPONSES_PER_PROMPT}")
    console, lengths = Console(width=130), response_lengths(arguments.max_tokens)
    num_tokens = int(arguments.responses * np.mean(lengths))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        config = make_run(Path(name), arguments)
        console.print(
            f"{arguments.responses} responses a step, {min(lengths)} to {max(lengths)} tokens, mean "
            f"{np.mean(lengths):.0f}: {num_tokens / 1e6:.1f} million tokens"
        )
        found = {"step": measure_step(config, arguments)} if arguments.steps else {}
        if found:
            show_step(found["step"], num_tokens, arguments.responses, console)
        if arguments.stage_groups:
            found["stages"] = measure_stages(config, arguments.stage_groups, arguments.repeats, console)
    if arguments.json:
        arguments.json.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
