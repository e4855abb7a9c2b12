"""The policy: a Megatron model with its optimizer, which scores sequences and learns from them."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func

from minpro_megatron.actor.after_forward import release_after_forward
from minpro_megatron.actor.flops import forward_flops
from minpro_megatron.actor.forward import ForwardStep, LossFunction, MicroBatch
from minpro_megatron.actor.kept_ids import with_supports
from minpro_megatron.actor.learning_rate import effective_sample_size_factor
from minpro_megatron.actor.loss import PolicyLoss, score, with_survey
from minpro_megatron.actor.megatron_configs import ddp_config
from minpro_megatron.actor.optimizer import make_optimizer
from minpro_megatron.actor.routing import (
    ChunkRouters,
    FreeRouting,
    RecordedRouting,
    ReplayedRouting,
    RolloutRoutes,
    Routes,
    Routing,
)
from minpro_megatron.actor.token_values import gathered_values
from minpro_megatron.batching.row_plan import RowPlan
from minpro_megatron.batching.row_shard import RankSlice
from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.checkpoints.shard_writing import ShardWrite
from minpro_megatron.checkpoints.training_state import load_training_state, run_identity, save_training_state
from minpro_megatron.config.run import RunConfig
from minpro_megatron.host_memory.snapshots import WeightSnapshots
from minpro_megatron.host_memory.trainer_memory import TrainerMemory
from minpro_megatron.metrics.metric import Metric, mean, merge
from minpro_megatron.models.architecture import Architecture
from minpro_megatron.objective import mean_statistics
from minpro_megatron.objective.across_ranks.group_ranks import GroupRanks
from minpro_megatron.objective.diagnostics import as_metrics, without_comparisons
from minpro_megatron.objective.registry import objective_for
from minpro_megatron.objective.terms import MiniBatch
from minpro_megatron.parallel.mesh import Mesh
from minpro_megatron.weights.local import global_parameters

Skipped = Literal["no trained token", "gradient not finite"]


@dataclass(frozen=True)
class UpdateResult:
    """One optimizer update. `metrics` and `histograms` are this rank's part and merge over ranks and updates."""

    grad_norm: float  # before clipping, over the whole model
    learning_rate: float
    skipped: Skipped | None = None  # why the update did not change the weights, if so
    metrics: dict[str, Metric] = field(default_factory=dict)
    histograms: dict[str, np.ndarray] = field(default_factory=dict)  # metrics.histograms
    # under the policy before the update, float32 [response tokens of the mini-batch]; on every rank, if recorded
    log_probs: np.ndarray | None = None

    @property
    def applied(self) -> bool:
        return self.skipped is None


class Policy:
    """The policy on one rank of the trainer. Every method is collective: all ranks call it together with the same
    sequences, and each rank works on its own share."""

    def __init__(
        self,
        config: RunConfig,
        architecture: Architecture,
        chunks: list[GPTModel],
        mesh: Mesh,
        *,
        records_log_probs: bool = False,
    ) -> None:
        """`chunks` are this rank's model chunks with their weights loaded. `records_log_probs`: updates return the
        log-probs of their tokens. With model.routing_replay = rollout every pass follows the routes of the sequences.
        Raises ValueError if the model then has no experts."""
        self._config = config
        self._records_log_probs = records_log_probs
        self._mesh = mesh
        self.modules = chunks
        buffers = ddp_config(config.parallel)
        self._chunks: list[Any] = [
            DistributedDataParallel(chunk.config, buffers, chunk, disable_bucketing=index > 0)
            for index, chunk in enumerate(chunks)
        ]
        self._optimizer = make_optimizer(config.optimizer, self._chunks)
        self._memory = TrainerMemory(self._chunks, self._optimizer)
        release_after_forward(chunks)
        for chunk in chunks:
            chunk.config.finalize_model_grads_func = finalize_model_grads
            chunk.config.grad_scale_func = self._optimizer.scale_loss
        # with overlap_grad_reduce only the backward of the last micro-batch may send gradients
        pauses: Any = [chunk.no_sync for chunk in self._chunks]
        for chunk in chunks:
            chunk.config.no_sync_func = pauses if len(pauses) > 1 else pauses[0]  # the form that each schedule expects
        self._objective = objective_for(config.objective)
        self._loss = PolicyLoss(mesh, self._objective, config.objective, config.loss)
        self.identity = run_identity(config, architecture)
        self._vocab_size, self._num_experts = architecture.vocab_size, architecture.num_experts
        self._rows = _row_plan(config, architecture, chunks, mesh)
        self._routers = ChunkRouters(chunks, architecture.num_experts)
        self._rollout_routes = (
            RolloutRoutes(self._routers, architecture, mesh) if config.model.routing_replay == "rollout" else None
        )
        self._snapshots = WeightSnapshots([parameter for chunk in chunks for parameter in chunk.parameters()])

    def score(
        self, sequences: Sequence[TokenSequence], routes: Routes | None = None, wanted: Sequence[bool] | None = None
    ) -> np.ndarray:
        """Log-probs of the response tokens under the current weights, float32 [all response tokens], on every rank.

        To get the same log-probs as an update, pass the update's whole mini-batch as `sequences`: then the rows are the
        same. `wanted` selects the sequences to score: rows without a selected sequence are skipped, and the values
        returned for sequences that are not selected have no meaning. Raises ValueError, on every rank and before any
        forward, if the servers' routes are replayed and are missing or do not match the model.
        """
        micro_batches, _ = self._micro_batches(sequences, wanted)
        micro_batches = self._restricted(sequences, micro_batches)
        routing = self._routing(sequences, micro_batches, routes)
        return self._score(sequences, micro_batches, routing)

    def score_canaries(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[np.ndarray]:
        """Log-probs of the response tokens of each (prompt, response), float32, which the servers should return too.
        The routers choose the experts; routes of rollouts are not used."""
        canaries, first_slot = [], 0
        for prompt, response in pairs:
            nothing = np.zeros(len(response), np.float32)
            canary = TokenSequence(
                prompt_ids=np.asarray(prompt, np.int32),
                response_ids=np.asarray(response, np.int32),
                loss_mask=nothing,
                behavior_log_probs=nothing,
                rollout_log_probs=nothing,
                advantage=0.0,
                first_slot=first_slot,
            )
            canaries.append(canary)
            first_slot += len(response)
        micro_batches, _ = self._micro_batches(canaries)
        log_probs = self._score(canaries, micro_batches, FreeRouting())
        return np.split(log_probs, [canary.first_slot for canary in canaries[1:]])

    def score_and_record(self, sequences: Sequence[TokenSequence]) -> tuple[np.ndarray, Routes]:
        """`score`, and the experts that were chosen, for replay with the same sequences."""
        assert self._rollout_routes is None, "the servers' routes are replayed: there are none to record"
        recorded = RecordedRouting(self._routers)
        micro_batches, _ = self._micro_batches(sequences)
        micro_batches = self._restricted(sequences, micro_batches)
        return self._score(sequences, micro_batches, recorded), recorded.routes

    def _score(
        self, sequences: Sequence[TokenSequence], micro_batches: list[MicroBatch], routing: Routing
    ) -> np.ndarray:
        outputs = self._run_forward(score, micro_batches, routing)
        return gathered_values(outputs, ["log_probs"], sequences, self._mesh.device)["log_probs"]

    def _routing(
        self, sequences: Sequence[TokenSequence], micro_batches: list[MicroBatch], recorded: Routes | None = None
    ) -> Routing:
        """The routing of a pass over the mini-batch: the servers' routes, those that an earlier pass `recorded`, or the
        routers' own choice."""
        if self._rollout_routes is not None:
            assert recorded is None, "each token has two routes: the servers' and recorded ones"
            routes = self._rollout_routes.of(sequences, [micro_batch.row for micro_batch in micro_batches])
            return ReplayedRouting(self._routers, routes)
        return FreeRouting() if recorded is None else ReplayedRouting(self._routers, recorded)

    def _restricted(self, sequences: Sequence[TokenSequence], micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        """The micro-batches with the ids that truncated sampling kept, if responses are sampled so."""
        top_k = self._config.sampling.top_k
        return with_supports(sequences, micro_batches, top_k, self._vocab_size, self._mesh) if top_k else micro_batches

    def inspect(self, sequences: Sequence[TokenSequence], seed: int = 0) -> dict[str, np.ndarray]:
        """The per-token values that an update on the mini-batch `sequences` would compute, float32 [all response
        tokens] by name, on every rank: log_probs, coefficients (-d loss / d log-prob, times the divisor of the
        aggregation; 0 where masked) and prefix_min."""
        micro_batches, _ = self._micro_batches(sequences)
        micro_batches = self._restricted(sequences, micro_batches)
        routing = self._routing(sequences, micro_batches)
        micro_batches = self._surveyed(micro_batches, seed, routing)
        outputs = self._run_forward(self._loss.inspect, micro_batches, routing)
        return gathered_values(outputs, ["log_probs", "coefficients", "prefix_min"], sequences, self._mesh.device)

    def update(
        self, sequences: Sequence[TokenSequence], learning_rate: float, seed: int = 0, routes: Routes | None = None
    ) -> UpdateResult:
        """One optimizer update on the mini-batch `sequences`; the loss is divided by its global token count.

        `seed` is for objectives that draw random numbers: different for every update, the same on all ranks.
        `routes`, recorded with the same sequences, are replayed if given. Raises ValueError as `score` does.
        """
        if not any(sequence.num_trained_tokens for sequence in sequences):
            num_tokens = sum(len(sequence.response_ids) for sequence in sequences)
            unknown = np.full(num_tokens, np.nan, np.float32) if self._records_log_probs else None
            return UpdateResult(0.0, learning_rate, skipped="no trained token", log_probs=unknown)
        metrics, histograms, log_probs = self.accumulate_gradient(sequences, seed, routes)
        if (factor := self._learning_rate_factor(metrics)) is not None:
            learning_rate *= factor
            metrics = metrics | {"optimizer/learning_rate_factor": mean(factor, 1)}
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
            # wd_mult, 0 for norms and biases, is applied by Megatron's scheduler, which is not used here
            group["weight_decay"] = self._config.optimizer.weight_decay * group["wd_mult"]
        # Megatron's step() would apply a NaN gradient to the weights: it checks for NaN only with fp16's loss scaler
        self._optimizer.prepare_grads()
        grad_norm = float(self._optimizer.get_grad_norm())  # over the whole model, the same on every rank
        if not math.isfinite(grad_norm):
            return UpdateResult(grad_norm, learning_rate, "gradient not finite", metrics, histograms, log_probs)
        self._optimizer.step()
        return UpdateResult(grad_norm, learning_rate, None, metrics, histograms, log_probs)

    def parameters_with_broken_gradient(self) -> list[str]:
        """Global names of the parameters whose last gradient has a value that is not finite, sorted, on every rank."""
        named = global_parameters(self.modules, self._num_experts, self._mesh)
        trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        mine = [name for name, parameter in trained.items() if not bool(_gradient(parameter).isfinite().all())]
        return sorted({name for names in self._mesh.from_all_ranks(mine) for name in names})

    def accumulate_gradient(
        self, sequences: Sequence[TokenSequence], seed: int = 0, routes: Routes | None = None
    ) -> tuple[dict[str, Metric], dict[str, np.ndarray], np.ndarray | None]:
        """Forward and backward of the mini-batch: its gradient replaces the content of the gradient buffers.

        Returns this rank's part of the metrics and of the histograms, and the tokens' log-probs if they are recorded.
        `update` calls this and then the optimizer's step.
        """
        self._snapshots.refuse_while_swapped("the gradient would be that of other weights")
        self._memory.refuse_while_away("update")
        micro_batches, row_metrics = self._micro_batches(sequences)
        micro_batches = self._restricted(sequences, micro_batches)
        routing = self._routing(sequences, micro_batches, routes)
        micro_batches = self._surveyed(micro_batches, seed, routing)
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        trained = self._run(self._loss.train, micro_batches, routing, forward_only=False)
        metrics, histograms = as_metrics([one.statistics for one in trained])
        if not self._config.objective.compares_policies:
            metrics, histograms = without_comparisons(metrics), {}
        means = merge(
            [mean_statistics.as_metrics(of_kind) for of_kind in zip(*(one.means for one in trained), strict=True)]
        )
        log_probs = None
        if self._records_log_probs:
            by_slot = [one.by_slot for one in trained]
            log_probs = gathered_values(by_slot, ["log_probs"], sequences, self._mesh.device)["log_probs"]
        return metrics | means | row_metrics, histograms, log_probs

    def save(self, folder: Path, in_background: bool = False) -> ShardWrite:
        """Start to write weights and optimizer state into the empty `folder`, in a form that any mesh can load. The
        next update may start at once; `complete` of the returned ShardWrite finishes the write."""
        self._snapshots.refuse_while_swapped("save")
        self._memory.refuse_while_away("save")
        return save_training_state(self.modules, self._optimizer, folder, self._mesh, in_background)

    def load(self, folder: Path) -> int:
        """Restore what `save` wrote. Returns the number of updates that the optimizer has made. Raises ValueError if
        the optimizer's state is not restored completely."""
        self._snapshots.refuse_while_swapped("load")
        self._memory.refuse_while_away("load")
        return load_training_state(self.modules, self._optimizer, folder, self._mesh)

    def take_snapshot(self, name: str) -> None:
        """Save a snapshot of the current weights in host memory as `name`."""
        self._memory.refuse_while_away("snapshot", but_states=True)
        self._snapshots.keep(name)

    def use_snapshot(self, name: str) -> AbstractContextManager[None]:
        """Context manager: inside it the model has the weights of snapshot `name`, for scoring. Updates are refused."""
        self._memory.refuse_while_away("snapshot", but_states=True)
        return self._snapshots.swapped_in(name)

    def to_host(self, but_weights: bool = False) -> None:
        """Releases the device's memory: optimizer states move to host memory, gradients are dropped, and the weights
        move too unless `but_weights`, with which scoring still works. What has moved already stays there."""
        self._snapshots.refuse_while_swapped("to_host")
        self._memory.to_host(but_weights)

    def to_device(self) -> None:
        """Undoes `to_host`, bit for bit, whatever part has moved."""
        self._memory.to_device()

    @property
    def parked_bytes(self) -> int:
        """Bytes of this rank that are in host memory because of `to_host`."""
        return self._memory.parked_bytes

    def _surveyed(self, micro_batches: list[MicroBatch], seed: int, routing: Routing) -> list[MicroBatch]:
        """The micro-batches with the results of the objective's survey; costs a forward pass if it has a survey."""
        if self._objective.survey is None:
            return micro_batches
        tokens = self._run_forward(self._loss.survey, micro_batches, routing)
        if not tokens:  # not the last pipeline stage
            return micro_batches
        mini_batch = MiniBatch(tokens, GroupRanks(self._mesh.stage), seed)
        return with_survey(micro_batches, self._objective.survey(mini_batch, self._config.objective))

    def _learning_rate_factor(self, metrics: dict[str, Metric]) -> float | None:
        """The factor that the mini-batch gives the learning rate, the same on every rank; None: nothing scales it."""
        factors, optimizer = [], self._config.optimizer
        if self._objective.learning_rate_factor is not None:
            factors.append(self._global_mean(metrics, self._objective.learning_rate_factor))
        if optimizer.scale_by_effective_sample_size:
            ratio, square = (self._global_mean(metrics, f"ratio/sequence_{name}") for name in ("mean", "square_mean"))
            factors.append(effective_sample_size_factor(ratio, square, optimizer.reference_effective_sample_size))
        return math.prod(factors) if factors else None

    def _global_mean(self, metrics: dict[str, Metric], name: str) -> float:
        part = metrics.get(name)
        sums = [part.total, part.count] if part else [0.0, 0.0]
        total = torch.tensor(sums, dtype=torch.float64, device=self._mesh.device)
        dist.all_reduce(total)
        return float(total[0] / total[1])

    def _micro_batches(
        self, sequences: Sequence[TokenSequence], wanted: Sequence[bool] | None = None
    ) -> tuple[list[MicroBatch], dict[str, Metric]]:
        """(this rank's micro-batches, metrics of the rows). Rows without a `wanted` sequence are skipped."""
        shards, row_metrics = self._rows.shards(sequences, wanted)
        return [MicroBatch(shard, index, self._mesh.device) for index, shard in enumerate(shards)], row_metrics

    def _run_forward(self, loss: LossFunction, micro_batches: list[MicroBatch], routing: Routing) -> list[Any]:
        with torch.no_grad():
            return self._run(loss, micro_batches, routing, forward_only=True)

    def _run(
        self,
        loss: LossFunction,
        micro_batches: list[MicroBatch],
        routing: Routing,
        forward_only: bool,
    ) -> list[Any]:
        """The loss function's value for each micro-batch; empty on ranks without the last pipeline stage."""
        self._memory.refuse_while_away("forward", but_states=True)
        iterators = [iter(micro_batches) for _ in self._chunks]
        temperature = self._config.sampling.temperature
        try:
            results = get_forward_backward_func()(
                forward_step_func=ForwardStep(self._mesh, self._vocab_size, temperature, loss, routing),
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self._chunks,
                num_microbatches=len(micro_batches),
                seq_length=self._config.batch.max_tokens_per_row,  # not used: every row has its own length
                micro_batch_size=1,
                forward_only=forward_only,
            )
        finally:
            self._routers.reset()
        return results or []


def _row_plan(config: RunConfig, architecture: Architecture, chunks: list[GPTModel], mesh: Mesh) -> RowPlan:
    layers = [layer for chunk in chunks for layer in chunk.modules()]
    data_size = mesh.data.size()
    return RowPlan(
        place=RankSlice(mesh.context.size(), mesh.context.rank(), mesh.tensor.size(), mesh.tensor.rank()),
        data_size=data_size,
        data_rank=mesh.data.rank(),
        # the interleaved schedule needs a multiple of the stages
        multiple=data_size * (mesh.pipeline.size() if mesh.config.virtual_pipeline > 1 else 1),
        max_tokens_per_row=config.batch.max_tokens_per_row,
        packing=config.batch.packing,
        pads_counts=any(getattr(layer, "has_graph_for_each_count", False) for layer in layers),
        cost=forward_flops(architecture),
    )


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    return cast(torch.Tensor, getattr(parameter, "main_grad"))  # noqa: B009 (Megatron's own attribute)
