"""Megatron layers in plain torch: what Transformer Engine provides on GPUs, for machines without it.

Shapes: T tokens of a packed row on this rank, H query heads, G query groups (key/value heads), D head dim,
N sequences in the row, Q and K the largest number of padded queries and keys of a sequence.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from minpro_megatron.batching.shards import context_shard


class TorchRMSNorm(torch.nn.Module):
    """RMSNorm computed in float32. It marks its weight for Megatron's sum of gradients over sequence-parallel ranks.
    Torch's own module cannot do this: Megatron's wrapper of it refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        normed = F.rms_norm(hidden.float(), (hidden.shape[-1],), self.weight.float(), self.eps)
        return normed.to(hidden.dtype)


@dataclass(frozen=True)
class PaddedLayout:
    """Index tensors between a packed row's tokens and [sequence, position] blocks. No index is -1: padding points
    at token 0, and the result of attention there is dropped (queries) or masked (keys)."""

    query_index_NQ: Tensor  # into this rank's T tokens
    query_slot_T: Tensor  # into the flattened [N * Q] block
    key_index_NK: Tensor  # into the C * T tokens gathered from the C context ranks, in the order of the ranks
    mask_N1QK: Tensor | None  # None: plain causal attention


def padded_layout(lengths: list[int], context_size: int, context_rank: int, device: torch.device) -> PaddedLayout:
    """The layout, on context rank `context_rank`, of a packed row whose sequences have the padded `lengths`."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    held = [context_shard(lengths, context_size, rank) for rank in range(context_size)]
    mine = held[context_rank]
    sequence = np.searchsorted(starts, mine, side="right") - 1
    counts = np.asarray(lengths) // context_size
    first = np.concatenate([[0], np.cumsum(counts)])[:-1]
    slot = np.arange(len(mine)) - first[sequence]  # index among this rank's tokens of the sequence
    num_sequences, width = len(lengths), int(counts.max())
    query_index = np.zeros((num_sequences, width), dtype=np.int64)
    query_index[sequence, slot] = np.arange(len(mine))
    query_position = np.full((num_sequences, width), -1)
    query_position[sequence, slot] = mine - starts[sequence]

    gathered = np.concatenate(held)
    key_sequence = np.searchsorted(starts, gathered, side="right") - 1
    key_index = np.zeros((num_sequences, max(lengths)), dtype=np.int64)
    key_index[key_sequence, gathered - starts[key_sequence]] = np.arange(len(gathered))

    mask = None
    if context_size > 1:
        visible = np.arange(max(lengths))[None, None, :] <= np.maximum(query_position, 0)[:, :, None]
        mask = torch.from_numpy(visible[:, None]).to(device)
    return PaddedLayout(
        query_index_NQ=torch.from_numpy(query_index).to(device),
        query_slot_T=torch.from_numpy(sequence * width + slot).to(device),
        key_index_NK=torch.from_numpy(key_index).to(device),
        mask_N1QK=mask,
    )


def packed_attention(
    query_THD: Tensor, key_value_T2GD: Tensor, layout: PaddedLayout, softmax_scale: float | None
) -> Tensor:
    """Attention inside each sequence of a packed row, [T, H * D]. The keys and values are those of all context ranks,
    in the order of the ranks."""
    key, value = key_value_T2GD[layout.key_index_NK].permute(2, 0, 3, 1, 4)  # each [N, G, K, D]
    query = query_THD[layout.query_index_NQ].transpose(1, 2)  # [N, H, Q, D]
    out_NHQD = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=layout.mask_N1QK,
        is_causal=layout.mask_N1QK is None,
        scale=softmax_scale,
        enable_gqa=True,
    )
    return out_NHQD.transpose(1, 2).flatten(0, 1)[layout.query_slot_T].flatten(1)


class _GatherAcrossRanks(torch.autograd.Function):
    """[T, ...] on every rank -> [ranks * T, ...] in the order of the ranks; backward sums each rank's part over the
    ranks."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = local.new_empty(group.size() * local.shape[0], *local.shape[1:])
        dist.all_gather_single(gathered, local.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()
        local = gradient.new_empty(gradient.shape[0] // ctx.group.size(), *gradient.shape[1:])
        dist.reduce_scatter_single(local, gradient, group=ctx.group)
        return local, None


class TorchAttention(MegatronModule):
    """Causal attention inside each sequence of a packed row, with context parallelism by gathering keys and values.

    Sequences are arranged in a padded block for torch's scaled_dot_product_attention. Padding on the right needs no
    mask: with causal attention no real token attends to it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.context_group: dist.ProcessGroup = pg_collection.cp
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query_THD: Tensor,
        key_TGD: Tensor,
        value_TGD: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None = None,
        **unused: Any,
    ) -> Tensor:
        assert packed_seq_params is not None, "rows are always packed (thd)"
        assert attention_mask is None, "the only mask is causality inside each sequence"
        layout = self._layout(packed_seq_params)
        key_value = torch.stack([key_TGD, value_TGD], dim=1)
        if self.context_group.size() > 1:
            key_value = _GatherAcrossRanks.apply(key_value, self.context_group)
        return packed_attention(query_THD, key_value, layout, self.softmax_scale)

    def _layout(self, packed: PackedSeqParams) -> PaddedLayout:
        """The layout of the row. The first layer computes it; it is stored with the row for the other layers."""
        layout = getattr(packed, "padded_layout", None)
        if layout is None:
            lengths = torch.diff(packed.cu_seqlens_q_padded).tolist()
            device = packed.cu_seqlens_q_padded.device
            layout = padded_layout(lengths, self.context_group.size(), self.context_group.rank(), device)
            packed.padded_layout = layout  # type: ignore[attr-defined]
        return layout


class _GroupedLinear(torch.autograd.Function):
    """Rows [T, in], grouped by expert, each multiplied by the weights [out, in] of its expert -> [T, out].

    `ends` int32 [E]: where each expert's rows end. Each expert keeps its own weight parameter. The weights are stacked
    for the product in forward and again in backward: this costs a copy each time, and no copy is kept in between.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ends: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, ends, *weights)
        if not len(rows):  # kernels refuse the strides of a matrix without rows
            return rows.new_empty(0, len(weights[0]))
        return F.grouped_mm(rows, torch.stack(weights).transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, ends, *weights = ctx.saved_tensors
        if not len(rows):
            return torch.zeros_like(rows), None, *map(torch.zeros_like, weights)
        gradient = gradients[0].contiguous()
        to_rows = F.grouped_mm(gradient, torch.stack(weights), offs=ends)
        to_weights = F.grouped_mm(gradient.t(), rows, offs=ends)
        # On sm_100 the product of an expert without rows is uninitialized memory; on other devices it is 0 (pytorch
        # issue 172439). The zeros are therefore written here on every device.
        has_no_rows = torch.diff(ends, prepend=ends.new_zeros(1)) == 0
        to_weights.masked_fill_(has_no_rows[:, None, None], 0)
        return to_rows, None, *to_weights.unbind()


class GroupedExperts(SequentialMLP):
    """Megatron's experts with the same parameters: one grouped product per projection for all experts of a rank."""

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """[T, hidden] grouped by expert, int [experts], [T] -> [T, hidden], each token scaled by its probability."""
        rows = permuted_local_hidden_states.contiguous()
        ends = tokens_per_expert.cumsum(0).to(torch.int32).to(rows.device, non_blocking=True)
        experts: Any = self.local_experts
        gate, up = _GroupedLinear.apply(rows, ends, *(expert.linear_fc1.weight for expert in experts)).chunk(2, dim=-1)
        inner = F.silu(gate) * up
        weighted = (inner * permuted_probs[:, None]).to(inner.dtype)
        return _GroupedLinear.apply(weighted, ends, *(expert.linear_fc2.weight for expert in experts)), None


def grouped_product_works(device: torch.device, dtype: torch.dtype, sizes: Sequence[int]) -> bool:
    """Whether torch.nn.functional.grouped_mm accepts matrices whose rows have `sizes` elements.

    Rows must start at multiples of 16 bytes. On GPUs it supports bfloat16 from compute capability 8.0 on.
    """
    if not hasattr(F, "grouped_mm") or any(size * dtype.itemsize % 16 for size in sizes):
        return False
    if device.type == "cuda":
        return dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (8, 0)
    return dtype in (torch.float32, torch.bfloat16)


class _Modules(LocalSpecProvider):
    """The layer modules of this backend, for Megatron's spec builders."""

    def __init__(self, grouped: bool) -> None:
        self._experts = GroupedExperts if grouped else SequentialMLP

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> Any:
        return TorchRMSNorm

    def core_attention(self) -> type:
        return TorchAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        return partial(self._experts, submodules=linears)


class TorchLayers:
    """The layers of `model.backend = torch`."""

    final_norm = TorchRMSNorm

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def settings(self, mixture: bool) -> dict[str, Any]:
        return {}  # Megatron's defaults: nothing is fused

    def build(self, config: TransformerConfig, make: Callable[[], GPTModel]) -> GPTModel:
        return make()

    def layer(self, config: TransformerConfig, mixture: bool) -> ModuleSpec:
        """`mixture`: its feed-forward network is made of experts."""
        modules = _Modules(grouped=self._grouped(config))
        add_residual: Any = get_bias_dropout_add
        return ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=TorchRMSNorm,
                self_attention=ModuleSpec(
                    module=SelfAttention,
                    params={"attn_mask_type": AttnMaskType.causal},
                    submodules=SelfAttentionSubmodules(
                        linear_qkv=modules.column_parallel_linear(),
                        core_attention=modules.core_attention(),
                        linear_proj=modules.row_parallel_linear(),
                        q_layernorm=TorchRMSNorm if config.qk_layernorm else None,
                        k_layernorm=TorchRMSNorm if config.qk_layernorm else None,
                    ),
                ),
                self_attn_bda=add_residual,
                pre_mlp_layernorm=TorchRMSNorm,
                mlp=get_mlp_module_spec_for_backend(
                    backend=modules, num_experts=config.num_moe_experts if mixture else None
                ),
                mlp_bda=add_residual,
            ),
        )

    def _grouped(self, config: TransformerConfig) -> bool:
        if config.moe_ffn_hidden_size is None:
            return False
        inner = config.moe_ffn_hidden_size // (config.expert_tensor_parallel_size or 1)
        return grouped_product_works(self._device, config.params_dtype, (config.hidden_size, inner))
