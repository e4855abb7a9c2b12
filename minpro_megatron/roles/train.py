"""The role `train`: one rank of the trainer, from its start to the run's export and report."""

import logging
import os
import time
from contextlib import closing
from functools import partial

import torch

from minpro_megatron.actor.flops import peak_flops, training_flops
from minpro_megatron.actor.loading import load_policy
from minpro_megatron.actor.profiles import open_tracer
from minpro_megatron.checkpoints.resume_point import CHECKPOINTS, read_latest
from minpro_megatron.checkpoints.run_checkpoints import RunCheckpoints
from minpro_megatron.checkpoints.save_schedule import EndedEarly, SaveSchedule
from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import FAILED, SUCCEEDED, ProjectError, report, report_unexpected
from minpro_megatron.feed.background import BackgroundScores
from minpro_megatron.feed.batch_source import BatchSource
from minpro_megatron.feed.demonstration_feed import DemonstrationFeed
from minpro_megatron.feed.feed import Feed
from minpro_megatron.feed.journal_feed import JournalFeed
from minpro_megatron.models.architecture import Architecture
from minpro_megatron.models.model_files import read_model_facts
from minpro_megatron.monitor.alarm_log import AlarmLog
from minpro_megatron.monitor.dashboard import hyperparameters
from minpro_megatron.monitor.environment import write_environment
from minpro_megatron.monitor.status import write_status
from minpro_megatron.monitor.step_report import StepReport
from minpro_megatron.monitor.summary import HF_EXPORT, summarize
from minpro_megatron.monitor.throughput import TrainerCompute
from minpro_megatron.monitor.trace import TracedWatchdog
from minpro_megatron.monitor.wandb_board import WandbBoard
from minpro_megatron.monitor.writer import RunWriter
from minpro_megatron.parallel.collective_records import write_collective_records
from minpro_megatron.parallel.mesh import Mesh, open_mesh
from minpro_megatron.parallel.rank_errors import record_errors
from minpro_megatron.prompts.tokenizer import TextTokenizer
from minpro_megatron.publishing.gather import WeightGatherer
from minpro_megatron.publishing.publish import Publisher
from minpro_megatron.publishing.turns import ServerTurns
from minpro_megatron.records import CollectorTotals
from minpro_megatron.report.run_end import record_end
from minpro_megatron.run_folder.early_end import EarlyEnd, read_stop_request, write_early_end
from minpro_megatron.run_folder.start_fence import StartFence
from minpro_megatron.train import RankZero, Trainer
from minpro_megatron.weights.hf_files import write_hf


def run(config: RunConfig, incarnation: int, save_by: float | None = None) -> int:
    """Trains this rank's share of the run. `save_by`: Unix time by which this start must have saved, if it has a limit.

    Returns 0 when the run is finished or has been saved for another start. Otherwise it returns 1, after it has
    reported an error of the project in one line, or any other error with its traceback.
    """
    logging.basicConfig(format="%(asctime)s train %(levelname)s %(message)s")
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    logging.getLogger("minpro_megatron").setLevel(logging.INFO)  # among others a line for each global step

    def train() -> None:
        hang_timeout_s = config.debug.hang_timeout_s
        fence = StartFence(config.run_dir, incarnation)
        with (
            fence.explaining(),
            open_mesh(config.parallel, config.device, config.seed, hang_timeout_s=hang_timeout_s) as mesh,
        ):
            try:
                _train(config, incarnation, save_by, mesh, fence)
            except EndedEarly as end:
                if mesh.rank == 0:
                    _announce_early_end(config, incarnation, True, end.version, end.reason)

    try:
        record_errors(train)
    except ProjectError as error:
        report(error, "train")
        return FAILED
    except Exception:
        return report_unexpected(f"train, rank {os.environ['RANK']}")
    return SUCCEEDED


def _train(config: RunConfig, incarnation: int, save_by: float | None, mesh: Mesh, fence: StartFence) -> None:
    started = time.monotonic()
    if config.device == "cpu":
        torch.set_num_threads(1)  # the ranks run in parallel
    first = mesh.rank == 0
    resumed_from = mesh.from_rank_0(read_latest(config.run_dir) if first else None)
    first_step = resumed_from.policy_version if resumed_from else 0
    feed = turns = None
    if config.server.takes_turns:  # the memory of the GPUs is the servers' until they have sampled the first batches
        feed = _feed(config, incarnation) if first else None
        turns = ServerTurns(config, mesh, feed)
        _say(config, mesh, "waiting for the servers to sample the first batch and to release their memory")
        turns.begin(first_step)
    _say(config, mesh, "loading the model")
    shows_ratios = config.collector.journal_ratios and config.objective.compares_policies
    policy, architecture = load_policy(config, mesh, records_log_probs=shows_ratios)
    gatherer = WeightGatherer(policy.modules, architecture, mesh)
    publisher = Publisher(config, gatherer, mesh, policy.score_canaries)
    if turns is not None:
        publisher.begin_from(turns.initial)
    checkpoints = RunCheckpoints(config.run_dir / CHECKPOINTS, config.checkpoint, mesh, fence.check)
    tracer = open_tracer(config, incarnation, mesh.rank, policy.modules, first_step)
    logs = config.run_dir / "logs"
    record = partial(write_collective_records, logs, incarnation, mesh.rank)
    watchdog = TracedWatchdog(logs / f"stacks-rank-{mesh.rank}.txt", config.debug.hang_timeout_s, tracer, record)
    optional = {"resumed_from": resumed_from, "tracer": tracer, "turns": turns}
    make_trainer = partial(Trainer, config, mesh, policy, publisher, checkpoints, watchdog, **optional)
    if not first:
        with closing(tracer), closing(publisher):
            make_trainer().run()
        _export(config, gatherer, mesh)
        return
    tokenizer = _tokenizer(config)
    feed = feed or _feed(config, incarnation)
    schedule = SaveSchedule(config, save_by, partial(_stop_request, config, incarnation))
    write_environment(config.run_dir)
    boards = [WandbBoard(config)] if config.wandb.enabled else []
    with (
        RunWriter(config.run_dir, first_step if incarnation else None, boards) as writer,
        closing(tracer),
        closing(publisher),
    ):
        writer.describe(hyperparameters(config))
        compute, alarms = _compute(config, architecture, mesh), AlarmLog(config, first_step)
        step_report = StepReport(writer, tokenizer.response_text, first_step, compute, alarms)
        announce = partial(_announce_early_end, config, incarnation, False)
        trainer = make_trainer(
            RankZero(feed, step_report, schedule, announce, fence.check, partial(_say, config, mesh))
        )
        totals = trainer.run()
    assert totals is not None, "rank 0 has a feed"
    fence.check()
    _say(config, mesh, "exporting the trained weights")
    _export(config, gatherer, mesh)
    fence.check()
    _conclude(config, trainer, totals, time.monotonic() - started)
    _say(config, mesh, "finished")


def _stop_request(config: RunConfig, incarnation: int) -> str | None:
    request = read_stop_request(config.run_dir, incarnation)
    return request.reason if request else None


def _announce_early_end(config: RunConfig, incarnation: int, saved: bool, version: int, reason: str) -> None:
    """Reports the early end to the launcher, which ends the other roles once the last checkpoint is complete."""
    write_status(config.run_dir, "train", f"{'saved' if saved else 'saving'} after global step {version} ({reason})")
    end = EarlyEnd(policy_version=version, reason=reason, saved=saved)
    write_early_end(config.run_dir, incarnation, end)


def _compute(config: RunConfig, architecture: Architecture, mesh: Mesh) -> TrainerCompute:
    name = "" if mesh.device.type == "cpu" else torch.cuda.get_device_name(mesh.device)
    return TrainerCompute(
        partial(training_flops, architecture), config.parallel.world_size, peak_flops(name, config.model.dtype)
    )


def _tokenizer(config: RunConfig) -> TextTokenizer:
    facts = read_model_facts(config.model.hf_path, config.sampling.extra_stop_tokens)
    return TextTokenizer(config.model.hf_path, facts)


def _feed(config: RunConfig, incarnation: int) -> BatchSource:
    if config.debug.journal:
        return JournalFeed(config, _tokenizer(config).text)
    if config.data.demonstrations:
        return DemonstrationFeed(config)
    feed = Feed(
        config.run_dir,
        incarnation,
        start_timeout_s=config.server.start_timeout_s,
        hang_timeout_s=config.debug.hang_timeout_s,
    )
    return BackgroundScores(feed)


def _export(config: RunConfig, gatherer: WeightGatherer, mesh: Mesh) -> None:
    buckets = gatherer.buckets(config.publish.bucket_bytes)
    if mesh.rank == 0:
        tensors = (pair for bucket in buckets for pair in bucket)
        write_hf(tensors, config.model.hf_path, config.run_dir / HF_EXPORT)
    else:
        for _ in buckets:
            pass


def _conclude(config: RunConfig, trainer: Trainer, totals: CollectorTotals, wall_time_s: float) -> None:
    summary = summarize(
        config,
        totals,
        steps=config.num_global_steps,
        updates=trainer.updates,
        wall_time_s=wall_time_s,
        wall_time_by_phase_s=trainer.seconds,
        hf_export=config.run_dir / HF_EXPORT,
    )
    record_end(config.run_dir, summary)


def _say(config: RunConfig, mesh: Mesh, phase: str) -> None:
    if mesh.rank == 0:
        write_status(config.run_dir, "train", phase)
