"""Watches every operator of a rank that runs on fake tensors.

Memory and collectives have files of their own. Here are the operators whose results depend on values, which fake
tensors do not have: each is recorded, because on a GPU the host waits for it, and gets a result of the largest possible
size.
"""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minpro_megatron.rehearsal.collectives import Collectives
from minpro_megatron.rehearsal.live_bytes import LiveBytes, calling_line
from minpro_megatron.rehearsal.record import HostRead

_aten = torch.ops.aten
# The shape functions of these accept operands of different dtypes; their CUDA kernels do not.
_ONE_DTYPE = {
    _aten.mm.default,
    _aten.mm.out,
    _aten.addmm.default,
    _aten.addmm.out,
    _aten.addmm_.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
}


class Observer(TorchDispatchMode):
    """Within a FakeTensorMode. `selected_rows` is the size of the next result of masked_select, if it is known."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = LiveBytes()
        self.collectives = Collectives()
        self.problems: Counter[str] = Counter()
        self.selected_rows: int | None = None
        self._host_reads: Counter[tuple[str, str, str]] = Counter()

    @property
    def host_reads(self) -> list[HostRead]:
        return [HostRead(*key, count) for key, count in sorted(self._host_reads.items())]

    def compiled(self, function: Callable) -> Callable:
        """`function` as torch.compile would make it: one kernel."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.memory.one_kernel():
                return function(*args, **kwargs)

        return call

    def note_problem(self, what: str) -> None:
        self.problems[f"{self.memory.phase}: {what} ({calling_line(of_project=True)})"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if Collectives.has(func):
            result, wrong = self.collectives.run(func, args, kwargs, self.memory.phase)
            for problem in wrong:
                self.note_problem(problem)
            return result
        if func is _aten._local_scalar_dense.default:
            return self._scalar(func, args, kwargs)
        if func is _aten.is_pinned.default:
            return True
        self._check_dtypes(func, args, kwargs)
        result = self._of_unknown_size(func, args)
        if result is None:
            func, args, kwargs = self._without_values(func, args, kwargs)
            self._note_copies(func, args, kwargs)
            result = func(*args, **kwargs)
        phase = self.memory.phases.get(self.memory.phase)
        if phase is not None:
            phase.operators += 1
        for leaf in tree_leaves(result):
            if isinstance(leaf, FakeTensor):
                self.memory.see(leaf)
        return result

    def _note_read(self, kind: str) -> None:
        self._host_reads[self.memory.phase, kind, calling_line(of_project=True)] += 1

    def _scalar(self, func: Any, args: Any, kwargs: Any) -> Any:
        if args[0].device.type == "cuda":
            self._note_read("item")
        try:
            return func(*args, **kwargs)
        except DataDependentOutputException:  # the value is not known: 1
            return True if args[0].dtype == torch.bool else 1.0 if args[0].dtype.is_floating_point else 1

    def _check_dtypes(self, func: Any, args: Any, kwargs: Any) -> None:
        if func in _ONE_DTYPE:
            dtypes = {str(leaf.dtype) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            if len(dtypes) > 1:
                self.note_problem(f"{func} of several dtypes: {sorted(dtypes)}")

    def _of_unknown_size(self, func: Any, args: Any) -> Tensor | None:
        """The result of an operator that returns as many rows as a mask has true places: all of them."""
        if func is _aten.nonzero.default:
            self._note_read("nonzero")
            return torch.empty(args[0].numel(), args[0].dim(), dtype=torch.int64, device=args[0].device)
        if func is _aten.masked_select.default:
            self._note_read("masked_select")
            rows = args[0].numel() if self.selected_rows is None else self.selected_rows
            self.selected_rows = None
            return torch.empty(rows, dtype=args[0].dtype, device=args[0].device)
        return None

    def _without_values(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
        """The same operator in a form whose result does not depend on values."""
        if func is _aten._pin_memory.default:
            return _aten.empty_like.default, args[:1], {}
        if func not in (_aten.index.Tensor, _aten.index_put_.default, _aten._unsafe_index.Tensor):
            return func, args, kwargs
        masks = [index for index in args[1] if index is not None and index.dtype == torch.bool]
        if func is _aten.index_put_.default and len(args[1]) == len(masks) == 1 and args[2].numel() == 1:
            mask, tensor = masks[0], args[0]  # CUDA fills without counting the mask
            widened = mask.view(*mask.shape, *[1] * (tensor.dim() - mask.dim()))
            return _aten.masked_fill_.Tensor, (tensor, widened, args[2]), kwargs
        indices = [whole for index in args[1] for whole in self._as_indices(index)]
        return func, (args[0], indices, *args[2:]), kwargs

    def _as_indices(self, index: Tensor | None) -> list[Tensor | None]:
        if index is None or index.dtype != torch.bool:
            return [index]
        self._note_read("boolean index")
        return [torch.empty(index.numel(), dtype=torch.int64, device=index.device) for _ in range(index.dim())]

    def _note_copies(self, func: Any, args: Any, kwargs: Any) -> None:
        asynchronous = " (asynchronous)" if kwargs.get("non_blocking") else ""
        if func is _aten._to_copy.default and args[0].device.type == "cuda":
            target = kwargs.get("device")
            if target is not None and torch.device(target).type == "cpu":
                self._note_read(f"copy to host{asynchronous}")
        if func is _aten.copy_.default and args[0].device.type == "cpu" and args[1].device.type == "cuda":
            self._note_read(f"copy to host{' (asynchronous)' if len(args) > 2 and args[2] else asynchronous}")
