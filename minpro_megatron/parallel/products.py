"""Matrix products with float32 results, for blocks of logits and their gradients."""

import torch
from torch import Tensor
from torch.nn import functional


def operand(matrix: Tensor) -> Tensor:
    """The matrix in the dtype that the products below need: on a CPU the result is float32 only for float32."""
    return matrix if matrix.is_cuda else matrix.float()


def product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left @ right in float32, accumulated in float32, also for bfloat16 operands."""
    if left.is_cuda:
        out = left.new_empty(left.shape[0], right.shape[1], dtype=torch.float32)
        return _addmm(out, left, right, scale, beta=0)
    out = cpu_product(left, right)
    return out if scale == 1 else out.mul_(scale)


def add_product(out: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """out += scale * left @ right for float32 `out`."""
    if left.is_cuda:
        _addmm(out, left, right, scale, beta=1)
    else:
        out.add_(cpu_product(left, right), alpha=scale)


def _addmm(out: Tensor, left: Tensor, right: Tensor, scale: float, beta: int) -> Tensor:
    if left.dtype == torch.float32:
        return out.addmm_(left, right, beta=beta, alpha=scale)
    return torch.addmm(out, left, right, out_dtype=torch.float32, beta=beta, alpha=scale, out=out)


def cpu_product(left: Tensor, right: Tensor) -> Tensor:
    if not torch.backends.mkldnn.is_available():
        return left @ right
    # torch.mm uses MKL, which does not use AVX-512 on AMD: 180 GFLOP/s instead of 400 with oneDNN (Zen 5, 2 cores).
    # A tensor in oneDNN's layout makes torch compute a float32 product with oneDNN.
    return functional.linear(left.to_mkldnn(), right.t()).to_dense()
