"""Stands in for the package transformer_engine where it cannot be installed: its modules in plain torch.

Names of parameters, constructor arguments, marks on parameters, extra state and collectives are those of Transformer
Engine 2.x, as far as megatron-core 0.19.2's wrappers of them (megatron/core/extensions/transformer_engine.py) and this
package use them. megatron's wrappers, the fused names and the checkpoints are therefore tried for real, and the kernels
of Transformer Engine are not: what runs on a GPU has to be tried on one.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

VERSION = "2.20.2"
NO_STATE = torch.empty(0, dtype=torch.uint8)  # Transformer Engine's extra state without float8


def install() -> None:
    """Make `import transformer_engine` find the stand-in, in this process, from now on. Before megatron is imported."""
    assert not any(name.startswith("megatron") for name in sys.modules), "megatron has already looked for it"
    package = _module("transformer_engine", __version__=VERSION)
    package.common = _module("transformer_engine.common")
    package.common.recipe = _module("transformer_engine.common.recipe", DelayedScaling=_Absent)
    package.pytorch = _module(
        "transformer_engine.pytorch",
        Linear=Linear,
        LayerNormLinear=LayerNormLinear,
        GroupedLinear=GroupedLinear,
        RMSNorm=RMSNorm,
        DotProductAttention=DotProductAttention,
    )
    float8 = {"FP8GlobalStateManager": _NoFloat8, "fp8_autocast": _no_context, "fp8_model_init": _Absent}
    package.pytorch.fp8 = _module("transformer_engine.pytorch.fp8", **float8)
    recompute = {"CudaRNGStatesTracker": _Absent, "activation_recompute_forward": _no_context}
    package.pytorch.distributed = _module("transformer_engine.pytorch.distributed", **recompute)
    package.pytorch.tensor = _module("transformer_engine.pytorch.tensor", QuantizedTensor=_Absent)
    routers = ("fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss", "fused_topk_with_score_function")
    package.pytorch.router = _module("transformer_engine.pytorch.router", **dict.fromkeys(routers, _Absent))


def _module(name: str, **content: Any) -> Any:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    vars(module).update(content)
    sys.modules[name] = module
    return module


class _NoFloat8:
    """Float8 is off, as Megatron asks when it recomputes a part of a layer."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


def _no_context(**settings: Any) -> AbstractContextManager[None]:
    return nullcontext()


class _Absent:
    """What megatron imports and a bfloat16 model never makes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("no part of a model without float8")


class _Module(torch.nn.Module):
    """Every module has an extra state; without float8 it is empty, and loading one is nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta = {"fp8_checkpoint": False}

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        pass

    def get_extra_state(self) -> Tensor:
        return NO_STATE

    def set_extra_state(self, state: Tensor | None) -> None:
        assert state is None or state.numel() == 0, "float8 state in a bfloat16 checkpoint"


class RMSNorm(_Module):
    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        device: Any = None,
    ) -> None:
        super().__init__()
        assert not zero_centered_gamma
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(normalized_shape, dtype=params_dtype, device=device))
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        return _rms_norm(hidden, self.weight, self.eps)


def _rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(hidden.float(), (hidden.shape[-1],), weight.float(), eps).to(hidden.dtype)


class Linear(_Module):
    """[..., in] -> [..., out]; "column" cuts the outputs over the tensor ranks, "row" the inputs, None nothing."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: dist.ProcessGroup | None = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
    ) -> None:
        super().__init__()
        assert not (bias and parallel_mode != "column")
        assert not return_bias
        assert parallel_mode in ("column", "row", None)
        self.parallel_mode, self.tp_group, self.tp_size = parallel_mode, tp_group, tp_size
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.sequence_parallel = sequence_parallel and tp_size > 1
        sizes = [out_features, in_features]
        if parallel_mode:
            sizes[parallel_mode == "row"] //= tp_size
        self.weight = _weight(sizes, parallel_mode, params_dtype, device)
        self.bias = _weight(sizes[:1], parallel_mode, params_dtype, device) if bias else None

    def forward(self, hidden: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        if self.parallel_mode == "row":
            return self._sum_over_ranks(_product(self, hidden, self.weight, is_first_microbatch))
        hidden = self._whole_sequence(hidden) if self.parallel_mode else hidden
        result = _product(self, hidden, self.weight, is_first_microbatch)
        return result if self.bias is None else result + self.bias

    def _whole_sequence(self, hidden: Tensor) -> Tensor:
        from megatron.core.tensor_parallel import mappings

        if self.sequence_parallel:
            return mappings.gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        return mappings.copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)

    def _sum_over_ranks(self, partial: Tensor) -> Tensor:
        from megatron.core.tensor_parallel import mappings

        if self.sequence_parallel:
            return mappings.reduce_scatter_to_sequence_parallel_region(partial, group=self.tp_group)
        return mappings.reduce_from_tensor_model_parallel_region(partial, group=self.tp_group)


class _SumInMainGradient(torch.autograd.Function):
    """A product whose weight's gradient is added to `main_grad`, or written into it by the first micro-batch; autograd
    gets a gradient without content."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Any, is_first: bool) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.weight, ctx.is_first = weight, is_first
        return F.linear(hidden, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (hidden,), (gradient,), weight = ctx.saved_tensors, gradients, ctx.weight
        product = gradient.flatten(0, -2).float().t() @ hidden.flatten(0, -2).float()
        (weight.main_grad.copy_ if ctx.is_first else weight.main_grad.add_)(product)
        weight.grad_added_to_main_grad = True
        return gradient @ weight, torch.full_like(weight, torch.nan), None


def _product(module: Any, hidden: Tensor, weight: Tensor, is_first: bool | None) -> Tensor:
    if module.fuse_wgrad_accumulation and torch.is_grad_enabled():
        return _SumInMainGradient.apply(hidden, weight, bool(is_first))
    return F.linear(hidden, weight)


def _weight(sizes: list[int], parallel_mode: str | None, dtype: torch.dtype | None, device: Any) -> torch.nn.Parameter:
    weight: Any = torch.nn.Parameter(torch.empty(sizes, dtype=dtype, device=device))
    weight.tensor_model_parallel = True
    weight.partition_dim = int(parallel_mode == "row")
    weight.partition_stride = 1
    return weight


class LayerNormLinear(Linear):
    """A norm and the projection after it; the norm sees the sequence-parallel shard."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        return_layernorm_output: bool = False,
        zero_centered_gamma: bool = False,
        sequence_parallel: bool = False,
        params_dtype: torch.dtype | None = None,
        device: Any = "cuda",
        **of_linear: Any,
    ) -> None:
        assert normalization == "RMSNorm"
        assert not return_layernorm_output
        assert not zero_centered_gamma
        super().__init__(
            in_features,
            out_features,
            sequence_parallel=sequence_parallel,
            params_dtype=params_dtype,
            device=device,
            **of_linear,
        )
        self.eps = eps
        norm_weight: Any = torch.nn.Parameter(torch.ones(in_features, dtype=params_dtype, device=device))
        norm_weight.sequence_parallel = self.sequence_parallel
        self.layer_norm_weight = norm_weight

    def forward(self, hidden: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        return super().forward(_rms_norm(hidden, self.layer_norm_weight, self.eps))


class GroupedLinear(_Module):
    """One weight an expert: weight0, weight1, ...; a run of rows for each."""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: dist.ProcessGroup | None = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
        ub_name: str | None = None,
        single_grouped_weight: bool = False,
        single_grouped_bias: bool = False,
    ) -> None:
        super().__init__()
        assert not bias
        assert not single_grouped_weight
        assert tp_size == 1, "megatron's dispatcher does what the experts' tensor ranks exchange"
        self.num_gemms, self.use_bias = num_gemms, bias
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        for index in range(num_gemms):
            setattr(self, f"weight{index}", _weight([out_features, in_features], parallel_mode, params_dtype, device))

    def forward(self, rows: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> Tensor:
        groups = rows.split(m_splits)
        weights = [getattr(self, f"weight{index}") for index in range(self.num_gemms)]
        return torch.cat(
            [_product(self, rows, weight, is_first_microbatch) for rows, weight in zip(groups, weights, strict=True)]
        )


class DotProductAttention(_Module):
    """Causal attention inside each sequence of a packed row, computed by the torch backend."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        attn_mask_type: str = "causal",
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        tp_group: dist.ProcessGroup | None = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: dist.ProcessGroup | None = None,
        cp_global_ranks: list[int] | None = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
    ) -> None:
        from minpro_megatron.actor.backends.torch_backend import TorchAttention

        super().__init__()
        assert num_gqa_groups is not None
        assert num_gqa_groups % tp_size == 0
        assert attention_dropout == 0
        assert cp_group is None or cp_comm_type == "p2p"
        alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
        groups = SimpleNamespace(cp=cp_group or alone)
        config: Any = self.config  # type: ignore[has-type]  megatron's wrapper sets it first
        self._attention = (TorchAttention(config, softmax_scale, groups),)  # in a tuple: no submodule

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        qkv_format: str,
        attn_mask_type: str,
        cu_seqlens_q: Tensor,
        cu_seqlens_kv: Tensor,
        cu_seqlens_q_padded: Tensor,
        cu_seqlens_kv_padded: Tensor,
        max_seqlen_q: int,
        max_seqlen_kv: int,
        pad_between_seqs: bool | None,
    ) -> Tensor:
        from megatron.core.packed_seq_params import PackedSeqParams

        assert (qkv_format, attn_mask_type) == ("thd", "padding_causal")
        assert cu_seqlens_q.dtype == torch.int32
        assert torch.equal(cu_seqlens_q, cu_seqlens_q_padded), "padding is part of its sequence"
        assert pad_between_seqs is False, "else Transformer Engine compares the two, and waits for the device"
        packed = PackedSeqParams(qkv_format=qkv_format, cu_seqlens_q_padded=cu_seqlens_q_padded)
        return self._attention[0](query, key, value, attention_mask, packed_seq_params=packed)
