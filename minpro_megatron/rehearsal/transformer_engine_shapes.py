"""Transformer Engine's modules as shapes: what each allocates, keeps for backward and sends, without its kernels.

The package needs a GPU, and its kernels do not accept fake tensors. These modules have the constructors, parameters and
calls that megatron-core 0.19.2 uses, and save what the modules of Transformer Engine 2.x save for backward. Workspaces
of cuBLAS and cuDNN are not included.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

VERSION = "2.20.2"


def install() -> None:
    """Makes `import transformer_engine` find these modules in this process. Before megatron is imported."""
    assert not any(name.startswith("megatron") for name in sys.modules), "megatron has already looked for it"
    package = _module("transformer_engine", __version__=VERSION)
    package.common = _module("transformer_engine.common")
    package.common.recipe = _module("transformer_engine.common.recipe", DelayedScaling=_Absent)
    modules = (Linear, LayerNormLinear, GroupedLinear, RMSNorm, DotProductAttention)
    package.pytorch = _module("transformer_engine.pytorch", **{module.__name__: module for module in modules})
    absent = {
        "fp8": ("FP8GlobalStateManager", "fp8_autocast", "fp8_model_init"),
        "distributed": ("CudaRNGStatesTracker", "activation_recompute_forward"),
        "tensor": ("QuantizedTensor",),
        "router": ("fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss", "fused_topk_with_score_function"),
    }
    for name, content in absent.items():
        setattr(package.pytorch, name, _module(f"transformer_engine.pytorch.{name}", **dict.fromkeys(content, _Absent)))
    _module(
        "transformer_engine.pytorch.permutation",
        moe_permute=_Absent,
        moe_permute_with_probs=_permute,
        moe_sort_chunks_by_index=_sort_chunks,
        moe_sort_chunks_by_index_with_probs=_sort_chunks_with_probs,
        moe_unpermute=_unpermute,
    )
    _module("transformer_engine.pytorch.attention")
    _module("transformer_engine.pytorch.attention.rope", apply_rotary_pos_emb=_rotary)
    _module(
        "transformer_engine.pytorch.optimizers",
        FusedAdam=FusedAdam,
        FusedSGD=_Absent,
        multi_tensor_applier=lambda operation, flag, lists, *rest: operation(0, flag, lists, *rest),
        multi_tensor_l2norm=_l2_norm,
        multi_tensor_scale=_scale,
        multi_tensor_scale_tensor=_scale,
    )


def _module(name: str, **content: Any) -> Any:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    vars(module).update(content)
    sys.modules[name] = module
    return module


class _Absent:
    """What megatron imports and a bfloat16 model never makes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("no part of a bfloat16 model")


# Modules


class _Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta = {"fp8_checkpoint": False}

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        pass

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        pass


def _parameter(sizes: list[int], dtype: torch.dtype | None, device: Any, **marks: Any) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.empty(sizes, dtype=dtype, device=device))
    vars(parameter).update(marks)
    return parameter


class RMSNorm(_Layer):
    def __init__(
        self, normalized_shape: int, *, sequence_parallel: bool, params_dtype: Any, device: Any, **unused: Any
    ) -> None:
        super().__init__()
        self.weight = _parameter([normalized_shape], params_dtype, device, sequence_parallel=sequence_parallel)

    def forward(self, hidden: Tensor) -> Tensor:
        return _Norm.apply(hidden, self.weight)


class Linear(_Layer):
    """[..., in] -> [..., out]; "column" splits the outputs over the tensor ranks, "row" the inputs."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        params_dtype: Any,
        parallel_mode: str | None = None,
        sequence_parallel: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        device: Any = "cuda",
        **unused: Any,
    ) -> None:
        super().__init__()
        self.parallel_mode, self.tp_group, self.tp_size = parallel_mode, tp_group, tp_size
        self.sequence_parallel = sequence_parallel and tp_size > 1
        sizes = [out_features, in_features]
        if parallel_mode:
            sizes[parallel_mode == "row"] //= tp_size
        self.weight = _parameter(sizes, params_dtype, device, **_split(parallel_mode))

    def forward(self, hidden: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        return _Projection.apply(hidden, self.weight, self)


def _split(parallel_mode: str | None) -> dict[str, Any]:
    return {"tensor_model_parallel": True, "partition_dim": int(parallel_mode == "row"), "partition_stride": 1}


class LayerNormLinear(Linear):
    def __init__(self, in_features: int, out_features: int, **settings: Any) -> None:
        super().__init__(in_features, out_features, **settings)
        self.layer_norm_weight = _parameter(
            [in_features],
            settings["params_dtype"],
            settings.get("device", "cuda"),
            sequence_parallel=self.sequence_parallel,
        )

    def forward(self, hidden: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        return _NormProjection.apply(hidden, self.weight, self.layer_norm_weight, self)


class GroupedLinear(_Layer):
    """One weight per expert: weight0, weight1, ...; a run of rows for each."""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        *,
        params_dtype: Any,
        parallel_mode: str | None = None,
        device: Any = "cuda",
        **unused: Any,
    ) -> None:
        super().__init__()
        self.num_gemms, self.use_bias = num_gemms, False
        for index in range(num_gemms):
            weight = _parameter([out_features, in_features], params_dtype, device, **_split(parallel_mode))
            setattr(self, f"weight{index}", weight)

    def forward(self, rows: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> Tensor:
        return _Experts.apply(rows, m_splits, *(getattr(self, f"weight{index}") for index in range(self.num_gemms)))


class DotProductAttention(_Layer):
    def __init__(self, *args: Any, cp_group: Any = None, **unused: Any) -> None:
        super().__init__()
        self._context_size = cp_group.size() if cp_group else 1

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **packed: Any
    ) -> Tensor:
        assert attention_mask is None
        assert packed["qkv_format"] == "thd"
        assert packed["cu_seqlens_q"].dtype == torch.int32
        assert packed["cu_seqlens_q"].is_cuda
        assert isinstance(packed["max_seqlen_q"], int)
        assert query.dtype == key.dtype == value.dtype == torch.bfloat16
        assert query.shape[0] == key.shape[0]
        assert query.shape[1] % key.shape[1] == 0
        return _Attention.apply(query, key, value, self._context_size)


# What they keep and allocate


def _empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(*shape, dtype=dtype or like.dtype, device=like.device)


def _norm_statistics(hidden: Tensor) -> Tensor:
    return _empty(hidden, hidden.numel() // hidden.shape[-1], dtype=torch.float32)


def _gathered(hidden: Tensor, layer: Linear) -> Tensor:
    if not layer.sequence_parallel:
        return hidden
    gathered = _empty(hidden, hidden.shape[0] * layer.tp_size, *hidden.shape[1:])
    dist.all_gather_single(gathered, hidden.contiguous(), group=layer.tp_group)
    return gathered


def _summed(partial: Tensor, layer: Linear) -> Tensor:
    if layer.tp_size == 1:
        return partial
    if not layer.sequence_parallel:
        dist.all_reduce(partial, group=layer.tp_group)
        return partial
    own = _empty(partial, partial.shape[0] // layer.tp_size, *partial.shape[1:])
    dist.reduce_scatter_single(own, partial, group=layer.tp_group)
    return own


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, _norm_statistics(hidden))
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight, _ = ctx.saved_tensors
        return torch.empty_like(hidden), torch.empty_like(weight)


class _NormProjection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, norm: Tensor, layer: Linear) -> Tensor:
        normed = torch.empty_like(hidden)
        ctx.save_for_backward(hidden, weight, norm, normed, _norm_statistics(hidden))
        ctx.layer = layer
        return functional.linear(_gathered(normed, layer), weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        _, weight, norm, normed, _ = ctx.saved_tensors
        whole = _gathered(normed, ctx.layer)  # asynchronous, beside the next product
        d_normed = _summed(gradients[0] @ weight, ctx.layer)
        d_weight = gradients[0].flatten(0, -2).t() @ whole.flatten(0, -2)
        return torch.empty_like(d_normed), d_weight, torch.empty_like(norm), None


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, layer: Linear) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.layer = layer
        if layer.parallel_mode == "row":
            return _summed(functional.linear(hidden, weight), layer)
        return functional.linear(_gathered(hidden, layer), weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (hidden, weight), layer = ctx.saved_tensors, ctx.layer
        if layer.parallel_mode == "row":
            gradient = _gathered(gradients[0], layer)
            return gradient @ weight, gradient.flatten(0, -2).t() @ hidden.flatten(0, -2), None
        d_hidden = gradients[0] @ weight
        d_weight = gradients[0].flatten(0, -2).t() @ _gathered(hidden, layer).flatten(0, -2)
        return _summed(d_hidden, layer), d_weight, None


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, splits: list[int], *weights: Tensor) -> Tensor:
        assert (sum(splits), len(splits)) == (rows.shape[0], len(weights)), (splits, rows.shape, len(weights))
        assert all(weight.dtype == rows.dtype and weight.shape[1] == rows.shape[1] for weight in weights)
        ctx.save_for_backward(rows, *weights)
        return _empty(rows, rows.shape[0], weights[0].shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, *weights = ctx.saved_tensors
        return torch.empty_like(rows), None, *[torch.empty_like(weight) for weight in weights]


class _Attention(torch.autograd.Function):
    """With context parallelism keys and values go around a ring of the context ranks, also in backward."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, context_size: int) -> Tensor:
        out = _empty(query, *query.shape[:2], value.shape[-1])
        log_sums = _empty(query, query.shape[0], query.shape[1], dtype=torch.float32)
        ctx.ring = context_size > 1
        if ctx.ring:
            own = torch.cat([key.reshape(-1), value.reshape(-1)])
            _received = [torch.empty_like(own) for _ in range(context_size - 1)]
            _partial = [torch.empty_like(out) for _ in range(context_size)]
            ctx.save_for_backward(query, own, out, log_sums)
        else:
            ctx.save_for_backward(query, key, value, out, log_sums)
        ctx.shapes = (key.shape, value.shape)
        return out.flatten(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, own, *_ = ctx.saved_tensors
        if ctx.ring:
            _buffers = [torch.empty_like(own) for _ in range(4)]  # two of keys and values, two of their gradients
            _partial = [torch.empty_like(query), torch.empty_like(own)]
        return torch.empty_like(query), *[_empty(query, *shape) for shape in ctx.shapes], None


class _Rearranged(torch.autograd.Function):
    """The same shape out as in; nothing large is saved."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, *small: Tensor) -> Tensor:
        ctx.save_for_backward(*small)
        ctx.shape = values.shape
        return torch.empty_like(values, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _empty(gradients[0], *ctx.shape), *[None] * len(ctx.saved_tensors)


class _Permuted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, probs: Tensor, routing_map: Tensor, num_rows: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        row_map = _empty(tokens, tokens.shape[0], 2 * routing_map.shape[1] + 1, dtype=torch.int32)
        ctx.save_for_backward(row_map)
        ctx.shapes = (tokens.shape, probs.shape)
        ctx.mark_non_differentiable(row_map)
        return _empty(tokens, num_rows, tokens.shape[1]), _empty(probs, num_rows), row_map

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tokens, probs = ctx.shapes
        return _empty(gradients[0], *tokens), _empty(gradients[1], *probs), None, None


class _Unpermuted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, row_map: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(row_map)
        ctx.shape = rows.shape
        return _empty(rows, *shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _empty(gradients[0], *ctx.shape), None, None


def _permute(tokens: Tensor, probs: Tensor, routing_map: Tensor, num_out_tokens: int) -> Any:
    return _Permuted.apply(tokens, probs, routing_map, num_out_tokens)


def _unpermute(rows: Tensor, row_map: Tensor, *, restore_shape: torch.Size, **unused: Any) -> Any:
    return _Unpermuted.apply(rows, row_map, restore_shape)


def _sort_chunks(rows: Tensor, split_sizes: Tensor, order: Tensor) -> Any:
    assert split_sizes.is_cuda, "chunks are sorted on the device"
    assert order.is_cuda
    return _Rearranged.apply(rows, _empty(rows, rows.shape[0], dtype=torch.int32))


def _sort_chunks_with_probs(rows: Tensor, probs: Tensor, split_sizes: Tensor, order: Tensor) -> Any:
    assert split_sizes.is_cuda, "chunks are sorted on the device"
    assert order.is_cuda
    row_map = _empty(rows, rows.shape[0], dtype=torch.int32)
    return _Rearranged.apply(rows, row_map), _Rearranged.apply(probs, row_map)


def _rotary(values: Tensor, freqs: Tensor, *, cu_seqlens: Tensor, **unused: Any) -> Any:
    assert freqs.dtype == torch.float32
    assert freqs.is_cuda
    assert cu_seqlens.is_cuda
    return _Rearranged.apply(values, freqs, cu_seqlens)


# The optimizer


class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float = 1e-3, **settings: Any) -> None:
        known = {name: settings[name] for name in ("betas", "eps", "weight_decay") if name in settings}
        super().__init__(params, {"lr": lr, "step": 0} | known)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] += 1
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                assert parameter.dtype == gradient.dtype == torch.float32
                assert parameter.is_cuda
                assert gradient.is_cuda
                assert parameter.shape == gradient.shape
                state = self.state[parameter]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                parameter.add_(state["exp_avg"])


def _l2_norm(chunk: int, flag: Any, lists: Any, per_parameter: bool) -> tuple[Tensor, None]:
    assert all(gradient.is_cuda and gradient.dtype == torch.float32 for gradient in lists[0])
    return torch.zeros(1, device=lists[0][0].device), None


def _scale(chunk: int, flag: Any, lists: Any, factor: Any) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source)
