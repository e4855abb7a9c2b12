"""One run of the study in one process: the trainer of `launch` with one rank, its servers replaced by SamplerSource."""

import logging
import shutil
import tempfile
from pathlib import Path

import torch

from benchmarks.stability_study.curves import read_run, write_stored
from benchmarks.stability_study.grid import RunKey
from benchmarks.stability_study.source import GroupSampler, SamplerPublisher, SamplerSource
from minpro_megatron.actor.loading import load_policy
from minpro_megatron.checkpoints.resume_point import CHECKPOINTS
from minpro_megatron.checkpoints.run_checkpoints import RunCheckpoints
from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import RunFailed
from minpro_megatron.models.model_files import read_model_facts
from minpro_megatron.monitor.step_report import StepReport
from minpro_megatron.monitor.watchdog import Watchdog
from minpro_megatron.monitor.writer import RunWriter
from minpro_megatron.parallel.mesh import Mesh, open_mesh
from minpro_megatron.prompts.tokenizer import TextTokenizer
from minpro_megatron.publishing.gather import WeightGatherer
from minpro_megatron.train import RankZero, Trainer


def train(config: RunConfig) -> str | None:
    """Trains from the beginning and writes metrics.jsonl and evaluations.jsonl to the run folder, which is emptied
    first. Returns None, or why the trainer gave the run up."""
    torch.set_num_threads(1)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    shutil.rmtree(config.run_dir, ignore_errors=True)
    config.run_dir.mkdir(parents=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        open_mesh(
            config.parallel, "cpu", config.seed, init_method=f"file://{Path(folder)}/rendezvous", rank=0, world_size=1
        ) as mesh,
    ):
        try:
            _run(config, mesh)
        except RunFailed as error:  # raised by train.py for a run that has diverged
            return str(error)
    return None


def run_and_store(key: RunKey, runs_dir: str, path: Path, inputs: str, *overrides: str) -> None:
    """Trains `key` and writes its stored file."""
    config = key.config(runs_dir, *overrides)
    given_up = train(config)
    write_stored(path, read_run(config.run_dir, key, inputs, config.num_global_steps, given_up))


def _run(config: RunConfig, mesh: Mesh) -> None:
    """As roles/train.py, with the source and the publisher of this process."""
    policy, architecture = load_policy(config, mesh)
    facts = read_model_facts(config.model.hf_path, config.sampling.extra_stop_tokens)
    tokenizer = TextTokenizer(config.model.hf_path, facts)
    sampler = GroupSampler(config, tokenizer)
    publisher = SamplerPublisher(
        config, WeightGatherer(policy.modules, architecture, mesh), mesh, policy.score_canaries, sampler
    )
    checkpoints = RunCheckpoints(config.run_dir / CHECKPOINTS, config.checkpoint, mesh)
    watchdog = Watchdog(config.run_dir / "stacks.txt", config.debug.hang_timeout_s)
    feed = SamplerSource(config, sampler, tokenizer)
    try:
        with RunWriter(config.run_dir) as writer:
            rank_zero = RankZero(feed, StepReport(writer, tokenizer.response_text))
            Trainer(config, mesh, policy, publisher, checkpoints, watchdog, rank_zero).run()
    finally:
        watchdog.close()
