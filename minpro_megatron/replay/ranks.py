"""One rank of a replay, started by torchrun: python -m minpro_megatron.replay.ranks WORK_FOLDER."""

import json
import logging
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from minpro_megatron.actor.model import DTYPES, ModelFeatures, build_model
from minpro_megatron.actor.policy import Policy
from minpro_megatron.batching.sequences import with_log_probs
from minpro_megatron.config.run import RunConfig
from minpro_megatron.config.seeds import derive_seed
from minpro_megatron.errors import ProjectError
from minpro_megatron.files.replacement import replace_file
from minpro_megatron.launch.prctl import end_with_parent
from minpro_megatron.metrics.metric import merge
from minpro_megatron.models.architecture import read_architecture
from minpro_megatron.models.text_files import state_dtype
from minpro_megatron.parallel.mesh import Mesh, open_mesh
from minpro_megatron.parallel.rank_errors import record_errors
from minpro_megatron.publishing.gather import WeightGatherer
from minpro_megatron.replay.batches import ReplayBatch, replay_batches
from minpro_megatron.replay.job import (
    MODEL,
    RESULT,
    SUMMARY,
    TOKENS,
    ReplayProgress,
    ReplayRows,
    read_job,
    state_error,
    write_progress,
)
from minpro_megatron.weights.hf_files import HfReader, dtype_name, write_hf
from minpro_megatron.weights.local import load_hf_tensors

BUCKET_BYTES = 512 << 20
PER_TOKEN = ("log_probs", "coefficients", "prefix_min")


class ReplayError(ProjectError):
    """The replay cannot continue, because values are no longer finite."""


@dataclass
class Replay:
    """The replay on this rank. Everything is collective; rank 0 writes into the work folder."""

    config: RunConfig
    mesh: Mesh
    folder: Path
    policy: Policy
    batches: list[ReplayBatch]
    lines: list[int]  # line number in the file, for each row
    updates: int
    tokens_done: int = 0
    tokens_total: int = 0

    def run(self) -> None:
        """Writes tokens.jsonl under the initial weights, then trains, then writes summary.json."""
        needs_scores = self.config.loss.kl.enabled or self.config.loss.decoupled.enabled
        passes = self.batches * (2 if needs_scores else 1)
        passes += [self.batches[index % len(self.batches)] for index in range(self.updates)]
        self.tokens_total = sum(batch.num_tokens for batch in passes)
        if needs_scores:
            self.batches = [self._scored(batch) for batch in self.batches]
        self._inspect()
        summary = [self._update(index) for index in range(self.updates)]
        if self.mesh.rank == 0:
            text = json.dumps({"updates": summary}, indent=2, allow_nan=False)
            replace_file(self.folder / RESULT / SUMMARY, text + "\n")

    def _scored(self, batch: ReplayBatch) -> ReplayBatch:
        """The initial weights are the KL penalty's reference and the proximal policy of the decoupled loss."""
        self._announce("scoring", batch)
        log_probs = self.policy.score(batch.sequences)
        [sequences] = with_log_probs([batch.sequences], reference_log_probs=log_probs, proximal_log_probs=log_probs)
        return replace(batch, sequences=sequences)

    def _inspect(self) -> None:
        texts = [""] * len(self.lines)
        for index, batch in enumerate(self.batches):
            self._announce("per-token values", batch)
            found = self.policy.inspect(batch.sequences, self._seed(index))
            for row, sequence in zip(batch.rows, batch.sequences, strict=True):
                place = slice(sequence.first_slot, sequence.first_slot + len(sequence.response_ids))
                values = {name: found[name][place] for name in PER_TOKEN}
                _refuse_broken(self.lines[row], values)
                if self.mesh.rank == 0:
                    record = {name: numbers.tolist() for name, numbers in values.items()}
                    texts[row] = json.dumps(record | {"advantage": sequence.advantage}, allow_nan=False)
        if self.mesh.rank == 0:
            replace_file(self.folder / RESULT / TOKENS, "".join(f"{text}\n" for text in texts))

    def _update(self, index: int) -> dict[str, float]:
        batch = self.batches[index % len(self.batches)]
        self._announce(f"update {index + 1}/{self.updates}", batch)
        result = self.policy.update(batch.sequences, self.config.optimizer.learning_rate, self._seed(index))
        loss = merge(self.mesh.from_all_ranks(result.metrics))["objective/loss"].value
        if not np.isfinite([loss, result.grad_norm]).all():
            raise ReplayError(
                f"update {index + 1}: loss = {loss}, gradient norm = {result.grad_norm}: not finite, so the weights "
                "cannot be updated; examine the updates before it with --updates"
            )
        return {"loss": loss, "grad_norm": result.grad_norm, "num_tokens": batch.num_trained_tokens}

    def _seed(self, update: int) -> int:
        return derive_seed(self.config.seed, "update", update)

    def _announce(self, phase: str, batch: ReplayBatch) -> None:
        """Reports the begin of a pass over `batch`."""
        if self.mesh.rank == 0:
            write_progress(self.folder, ReplayProgress(phase, self.tokens_done, self.tokens_total))
        self.tokens_done += batch.num_tokens


def _refuse_broken(line: int, values: dict[str, np.ndarray]) -> None:
    for name, numbers in values.items():
        broken = np.flatnonzero(~np.isfinite(numbers))
        if len(broken):
            raise ReplayError(
                f"line {line}: {name}[{broken[0]}] = {numbers[broken[0]]} under the initial weights: "
                "do they hold NaN or infinity?"
            )


def replay(folder: Path, config: RunConfig, rows: ReplayRows, mesh: Mesh) -> None:
    """Loads the model, replays `rows`, and writes tokens, model and summary into the work folder's result."""
    if config.device == "cpu":
        torch.set_num_threads(1)  # the ranks run in parallel
    first = mesh.rank == 0
    if first:
        write_progress(folder, ReplayProgress("loading the model"))
    architecture = read_architecture(config.model.hf_path)
    chunks = build_model(architecture, mesh, DTYPES[config.model.dtype], ModelFeatures(backend=config.model.backend))
    load_hf_tensors(chunks, architecture, mesh, HfReader(config.model.hf_path))
    policy = Policy(config, architecture, chunks, mesh)
    gatherer = WeightGatherer(chunks, architecture, mesh)
    batches = replay_batches(rows.rollouts, rows.groups_per_batch, config.loss, config.sampling.max_response_tokens)
    lines = [rollout.line for rollout in rows.rollouts]
    whole = Replay(config, mesh, folder, policy, batches, lines, rows.updates)
    whole.run()
    if first:
        write_progress(folder, ReplayProgress("writing the model", whole.tokens_total, whole.tokens_total))
    buckets = gatherer.buckets(BUCKET_BYTES)
    if first:
        output = folder / RESULT / MODEL
        write_hf((pair for bucket in buckets for pair in bucket), config.model.hf_path, output)
        state_dtype(output / "config.json", dtype_name(DTYPES[config.model.dtype]))
    else:
        for _ in buckets:
            pass


def main(arguments: Sequence[str] = sys.argv[1:]) -> int:
    end_with_parent(signal.SIGKILL)  # it may hang in a collective, where it could not handle SIGTERM
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    folder = Path(arguments[0])
    config, rows = read_job(folder)

    def work() -> None:
        with open_mesh(config.parallel, config.device, config.seed) as mesh:
            replay(folder, config, rows, mesh)

    try:
        record_errors(work)
    except ProjectError as error:
        state_error(folder, error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
