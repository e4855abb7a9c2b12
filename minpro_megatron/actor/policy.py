"""The policy: a Megatron model with its optimizer, which scores sequences and learns from them."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from minpro_megatron.actor.forward import ForwardStep, LossSettings, MicroBatch
from minpro_megatron.batching.collate import RankSlice, TokenSequence, padded_length, row_length, shard_row
from minpro_megatron.batching.packing import pack_rows, rows_of_rank
from minpro_megatron.config.run import RunConfig
from minpro_megatron.config.trainer import OptimizerConfig
from minpro_megatron.monitor.metrics import Metric, mean, merge
from minpro_megatron.objective.diagnostics import Statistic
from minpro_megatron.objective.registry import OBJECTIVES
from minpro_megatron.parallel.mesh import Mesh
from minpro_megatron.weights.architecture import Architecture


@dataclass(frozen=True)
class UpdateResult:
    """One optimizer update. `metrics` are this rank's part and merge over ranks and updates."""

    grad_norm: float  # before clipping, over the whole model
    applied: bool  # False: the gradient was not finite and the weights are as before
    metrics: dict[str, Metric]


class Policy:
    """The trainer's side of the policy on one rank. Every method is collective: all ranks call it together with the
    same sequences, and each works on its own share."""

    def __init__(self, config: RunConfig, architecture: Architecture, chunks: list[GPTModel], mesh: Mesh) -> None:
        """`chunks` are this rank's model chunks with their weights loaded."""
        self._config = config
        self._mesh = mesh
        self.modules = chunks
        self._place = RankSlice(mesh.context.size(), mesh.context.rank(), mesh.tensor.size(), mesh.tensor.rank())
        ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        self._chunks: list[Any] = [
            DistributedDataParallel(chunk.config, ddp_config, chunk, disable_bucketing=index > 0)
            for index, chunk in enumerate(chunks)
        ]
        self._optimizer = get_megatron_optimizer(_megatron_optimizer(config.optimizer, chunks[0]), self._chunks)
        for chunk in chunks:
            chunk.config.finalize_model_grads_func = finalize_model_grads
            chunk.config.grad_scale_func = self._optimizer.scale_loss
        settings = LossSettings(
            OBJECTIVES[config.objective.name],
            config.objective,
            architecture.vocab_size,
            config.sampling.temperature,
        )
        self._score_step = ForwardStep(mesh, settings, train=False)
        self._train_step = ForwardStep(mesh, settings, train=True)
        self._sampling_weights: list[torch.Tensor] | None = None
        self._swapped = False

    def score(self, sequences: Sequence[TokenSequence]) -> np.ndarray:
        """Log-probs of the response tokens under the current weights, float32 [all response tokens], on every rank."""
        micro_batches, row_tokens, _ = self._micro_batches(sequences)
        with torch.no_grad():
            outputs = self._run(self._score_step, micro_batches, row_tokens, forward_only=True)
        flat = torch.zeros(sum(len(sequence.response_ids) for sequence in sequences), device=self._mesh.device)
        for log_probs, slots in outputs:
            slots = torch.from_numpy(slots).to(flat.device)
            flat[slots[slots >= 0]] = log_probs[slots >= 0]
        # Every token has one owner among last-stage ranks; the others add zero, so the sum is exact.
        dist.all_reduce(flat)
        return flat.cpu().numpy()

    def update(self, sequences: Sequence[TokenSequence], learning_rate: float) -> UpdateResult:
        """One optimizer update on the mini-batch `sequences`; the loss is divided by its global token count."""
        assert not self._swapped, "the sampling weights are swapped in: an update would be lost"
        micro_batches, row_tokens, padding = self._micro_batches(sequences)
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        statistics = self._run(self._train_step, micro_batches, row_tokens, forward_only=False)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        # megatron's step() would write a NaN gradient into the weights: it looks for one only under fp16's scaler
        optimizer: Any = self._optimizer
        optimizer.prepare_grads()
        grad_norm = float(optimizer.get_grad_norm())  # over the whole model, the same on every rank
        applied = math.isfinite(grad_norm)
        if applied:
            optimizer.step()
        return UpdateResult(grad_norm, applied, _as_metrics(statistics) | {"batch/padding_fraction": padding})

    def keep_sampling_weights(self) -> None:
        """Remember the current weights in host memory: the version that the servers sample with now."""
        assert not self._swapped, "the sampling weights are swapped in already"
        parameters = [parameter for chunk in self.modules for parameter in chunk.parameters()]
        if self._sampling_weights is None:
            pin = self._mesh.device.type == "cuda"
            self._sampling_weights = [torch.empty_like(p, device="cpu", pin_memory=pin) for p in parameters]
        with torch.no_grad():
            for kept, parameter in zip(self._sampling_weights, parameters, strict=True):
                kept.copy_(parameter)

    @contextmanager
    def sampling_weights(self) -> Iterator[None]:
        """Within: the kept weights are in place, for scoring. Updating is refused meanwhile."""
        assert self._sampling_weights is not None, "keep_sampling_weights() comes first"
        assert not self._swapped, "the sampling weights are swapped in already"
        parameters = [parameter for chunk in self.modules for parameter in chunk.parameters()]
        current = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
        self._copy_in(parameters, self._sampling_weights)
        self._swapped = True
        try:
            yield
        finally:
            # in place: the float32 optimizer's master weights are views of the same memory
            self._copy_in(parameters, current)
            self._swapped = False

    @staticmethod
    def _copy_in(parameters: Sequence[torch.nn.Parameter], values: Sequence[torch.Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)

    def _micro_batches(self, sequences: Sequence[TokenSequence]) -> tuple[list[MicroBatch], int, Metric]:
        """(this rank's micro-batches, tokens of a row, the share of slots that are padding)."""
        place, batch = self._place, self._config.batch
        lengths = [padded_length(sequence, place.context_size) for sequence in sequences]
        multiple = self._mesh.data.size()
        if self._mesh.config.virtual_pipeline > 1:
            multiple *= self._mesh.pipeline.size()  # the interleaved schedule wants whole rounds of stages
        if batch.packing:
            rows = pack_rows(lengths, batch.max_tokens_per_row, multiple)
        else:
            rows = [[index] for index in range(len(lengths))]
            rows += [[] for _ in range(-len(rows) % multiple)]
        row_tokens = row_length(rows, lengths, place.context_size, place.tensor_size)
        mine = rows_of_rank(len(rows), self._mesh.data.size(), self._mesh.data.rank())
        shards = [shard_row([sequences[index] for index in rows[row]], row_tokens, place) for row in mine]
        real = sum(sequence.num_tokens for sequence in sequences)
        padding = mean(len(rows) * row_tokens - real, len(rows) * row_tokens)
        return [MicroBatch(shard, self._mesh.device) for shard in shards], row_tokens, padding

    def _run(
        self, step: ForwardStep, micro_batches: list[MicroBatch], row_tokens: int, forward_only: bool
    ) -> list[Any]:
        """What the loss function gave for each micro-batch; nothing where there is no last pipeline stage."""
        iterators = [iter(micro_batches) for _ in self._chunks]
        results = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self._chunks,
            num_microbatches=len(micro_batches),
            seq_length=row_tokens,
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return results or []


def _megatron_optimizer(config: OptimizerConfig, chunk: GPTModel) -> MegatronOptimizerConfig:
    dtype = chunk.config.params_dtype
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.epsilon,
        clip_grad=config.clip_grad,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_distributed_optimizer=True,
    )


def _as_metrics(micro_batches: Sequence[dict[str, Statistic]]) -> dict[str, Metric]:
    """The statistics as numbers, with one transfer from the device; empty where there is no last pipeline stage."""
    statistics = [(name, s) for micro_batch in micro_batches for name, s in micro_batch.items()]
    if not statistics:
        return {}
    flat = torch.stack([value.double() for _, s in statistics for value in (s.total, s.count)]).tolist()
    totals, counts = flat[0::2], flat[1::2]
    parts = [
        {name: Metric(total, count, s.reduction)}
        for (name, s), total, count in zip(statistics, totals, counts, strict=True)
    ]
    return merge(parts)


def learning_rate_at(config: OptimizerConfig, step: int) -> float:
    """The learning rate of global step `step` (from 0): linear warm-up over whole global steps, then constant."""
    return config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup_global_steps))
