"""The compiled functions of Transformer Engine 2.20.2 as shapes: what each allocates and returns, without its kernel.

Every function has the name and the arguments of the function of `transformer_engine_torch` that it replaces. Files and
lines are of the source package transformer_engine_torch-2.20.2, folder csrc/extensions. What is allocated there, or
declared as an output, is allocated here. Not included are workspaces whose sizes the compiled core library decides: of
the norms' backward pass and of cuDNN's attention.

Only what a bfloat16 model of this project calls is here. FLOAT8 arguments (quantizers) must be None.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_LOADED_AT_ONCE = 16  # bytes
_COMPUTE_STREAMS = 4  # nvte_get_num_compute_streams of the core library 2.20.2
_CUDNN_VERSION = 92400  # nvidia-cudnn-cu13, as environment/constraints.txt pins it


def _empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(*shape, dtype=dtype or like.dtype, device=like.device)


# Norms


def rmsnorm_fwd(
    input: Tensor, weight: Tensor, eps: float, out: Tensor | None, quantizer: None, *unused: Any
) -> list[Tensor | None]:
    """[output, None, reciprocal root mean squares] (normalization.cpp:305; the latter :317)."""
    assert quantizer is None
    assert input.dtype == weight.dtype, (input.dtype, weight.dtype)
    statistics = _empty(input, input.numel() // input.shape[-1], dtype=torch.float32)
    return [torch.empty_like(input) if out is None else out, None, statistics]


def rmsnorm_bwd(d_output: Tensor, input: Tensor, statistics: Tensor, weight: Tensor, *unused: Any) -> list[Tensor]:
    """[gradient of the input, gradient of the weight] (normalization.cpp:216); copies what is not contiguous."""
    assert d_output.dtype == input.dtype == weight.dtype
    d_output, input = d_output.contiguous(), input.contiguous()
    assert d_output.numel() == input.numel()
    return [torch.empty_like(input), torch.empty_like(weight)]


# Products


def generic_gemm(
    a: Tensor,
    transposes_a: bool,
    b: Tensor,
    transposes_b: bool,
    out: Tensor | None,
    quantizer: None,
    out_dtype: int | None,
    bias: Tensor | None,
    bias_dtype: int,
    gelu: bool,
    gelu_input: None,
    is_gradient: bool,
    *unused: Any,
    **also_unused: Any,
) -> tuple[Tensor, Tensor | None, None, None]:
    """(product, gradient of a bias, no input of an activation, nothing else) (gemm.cpp:144)."""
    assert quantizer is None
    assert not gelu
    assert a.dtype == b.dtype, (a.dtype, b.dtype)
    assert a.is_cuda
    assert b.is_cuda
    shape = _product_shape(a, transposes_a, b, transposes_b)
    if out is None:
        out = _empty(a, *shape, dtype=None if out_dtype is None else _torch_dtype(out_dtype))
    assert out.numel() == torch.Size(shape).numel(), (out.shape, shape)
    if bias is None:
        return out, None, None, None
    columns = b.shape[-1] if is_gradient else shape[-1]
    assert bias.shape == (columns,), (bias.shape, columns)
    return out, _empty(a, columns, dtype=out.dtype) if is_gradient else None, None, None


def _torch_dtype(number: int) -> torch.dtype:
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    return TE_DType_To_Torch[number]


def _product_shape(a: Tensor, transposes_a: bool, b: Tensor, transposes_b: bool) -> list[int]:
    """The shape of b x a, whose leading dimensions are those of b (getGemmOutputShape, gemm.cpp:35)."""
    a_rows, b_rows = a.shape[:-1].numel(), b.shape[:-1].numel()
    inner, other = a.shape[-1] if transposes_a else a_rows, b_rows if transposes_b else b.shape[-1]
    assert inner == other, f"a product of {tuple(b.shape)} and {tuple(a.shape)}"
    columns = a_rows if transposes_a else a.shape[-1]
    return [b.shape[-1], columns] if transposes_b else [*b.shape[:-1], columns]


def te_general_grouped_gemm(
    a: Sequence[Tensor],
    transposes_a: bool,
    b: Sequence[Tensor],
    transposes_b: bool,
    out: Sequence[Tensor],
    out_dtype: int,
    rows: Sequence[int],
    bias: Any,
    *unused: Any,
) -> Any:
    """The given biases; a product for each group is written to `out` (gemm.cpp:468)."""
    products = [_product_shape(left, transposes_a, right, transposes_b) for left, right in zip(a, b, strict=True)]
    wanted = sum(torch.Size(shape).numel() for shape in products)
    assert wanted == sum(one.numel() for one in out), (products, [tuple(one.shape) for one in out])
    assert len({one.dtype for one in (*a, *b)}) == 1
    return bias


def get_num_cublas_streams() -> int:
    """The number of workspaces of grouped products (pytorch/cpp_extensions/gemm.py:60)."""
    return _COMPUTE_STREAMS


# Attention


def get_cudnn_version() -> int:
    return _CUDNN_VERSION


def get_fused_attn_backend(settings: Any) -> tuple[int, str]:
    """(cuDNN's attention for sequences of any length, no reason against it) (attention.cpp:14). What Transformer
    Engine's Python checks before it asks, it has checked; what cuDNN would refuse is not known here."""
    import transformer_engine_torch as compiled

    return compiled.NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen, ""


_FORWARD_ARGUMENTS = 14  # of settings, before the tensors
_BACKWARD_ARGUMENTS = 17


def fused_attn_fwd(*arguments: Any) -> list[Tensor]:
    """[output, log-sums of the softmax [tokens, heads, 1], random state] (attention.cpp:122; the latter :319)."""
    offsets, key_offsets, query, key, value, dtype = arguments[_FORWARD_ARGUMENTS : _FORWARD_ARGUMENTS + 6]
    _check_attention(offsets, key_offsets, query, key, value)
    out = _empty(query, *query.shape[:-1], value.shape[-1], dtype=dtype)
    log_sums = _empty(query, *query.shape[:-1], 1, dtype=torch.float32)
    return [out, log_sums, _empty(query, 2, dtype=torch.int64)]


def fused_attn_bwd(*arguments: Any) -> list[Tensor | None]:
    """Gradients of [query, key, value, no bias, no softmax offset] (attention.cpp:346)."""
    first = _BACKWARD_ARGUMENTS
    offsets, key_offsets, query, key, value, out, d_out, dtype = arguments[first : first + 8]
    _check_attention(offsets, key_offsets, query, key, value)
    assert out.shape == d_out.shape
    return [*(_empty(one, *one.shape, dtype=dtype) for one in (query, key, value)), None, None]


def _check_attention(offsets: Tensor, key_offsets: Tensor, query: Tensor, key: Tensor, value: Tensor) -> None:
    assert offsets.dtype == key_offsets.dtype == torch.int32
    assert offsets.is_cuda
    assert key_offsets.is_cuda
    assert query.dtype == key.dtype == value.dtype == torch.bfloat16
    assert key.shape[:-1] == value.shape[:-1]
    assert query.shape[-2] % key.shape[-2] == 0


# Attention over context ranks: halves of sequences, and corrections in place


def thd_read_half_tensor(tensor: Tensor, offsets: Tensor, half: int) -> Tensor:
    """One half of every sequence; tokens are dimension 0 of three, 1 of four (attention.cpp:830)."""
    assert tensor.shape[-2:].numel() * tensor.element_size() % _LOADED_AT_ONCE == 0
    shape = list(tensor.shape)
    shape[tensor.dim() - 3] //= 2
    return _empty(tensor, *shape)


def thd_read_second_half_lse(log_sums: Tensor, offsets: Tensor, packed: bool, tokens: int) -> Tensor:
    """(attention.cpp:914)"""
    return _empty(log_sums, *log_sums.shape[:-1], tokens)


def thd_second_half_lse_correction(*arguments: Any) -> None:
    """In place (attention.cpp:870)."""


def thd_out_correction(*arguments: Any) -> None:
    """In place (attention.cpp:963)."""


def thd_grad_correction(*arguments: Any) -> None:
    """In place (attention.cpp:981)."""


# Rotary angles


def fused_rope_forward(
    values: Tensor, angles: Tensor, starts: None, layout: int, interleaved: bool, offsets: Tensor | None, *ranks: int
) -> Tensor:
    """The values turned, contiguous (apply_rope.cpp:12)."""
    assert angles.dim() == 4
    assert angles.dtype == torch.float32
    assert angles.is_cuda
    assert offsets is None or offsets.is_cuda
    return _empty(values, *values.shape)


def fused_rope_backward(gradients: Tensor, angles: Tensor, *rest: Any) -> Tensor:
    """(apply_rope.cpp:165)"""
    return fused_rope_forward(gradients, angles, *rest)


# Optimizer


def multi_tensor_adam(chunk: int, flag: Tensor, lists: Sequence[Sequence[Tensor]], *unused: Any) -> None:
    """Gradients, parameters and two moments, in place (multi_tensor/adam.cpp:11)."""
    for tensors in zip(*lists, strict=True):
        assert len({(one.shape, one.dtype, one.device) for one in tensors}) == 1, [one.shape for one in tensors]
        assert tensors[0].is_cuda


def multi_tensor_l2norm(
    chunk: int, flag: Tensor, lists: Sequence[Sequence[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    """(norm [1], no norms of single tensors) (multi_tensor/l2norm.cpp:11)."""
    assert not per_tensor
    first = lists[0][0]
    assert all(one.is_cuda for one in lists[0])
    return _empty(first, 1, dtype=torch.float32), _empty(first, 0, dtype=torch.float32)


def multi_tensor_scale(chunk: int, flag: Tensor, lists: Sequence[Sequence[Tensor]], factor: Any) -> None:
    """From the first list into the second (multi_tensor/scale.cpp:11)."""
    for source, target in zip(*lists, strict=True):
        assert source.shape == target.shape
        assert source.is_cuda
        assert target.is_cuda


def multi_tensor_scale_tensor(chunk: int, flag: Tensor, lists: Sequence[Sequence[Tensor]], factor: Tensor) -> None:
    """(multi_tensor/scale.cpp:21)"""
    multi_tensor_scale(chunk, flag, lists, factor)
