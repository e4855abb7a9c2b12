"""Every collective of a rank: recorded, and checked for what NCCL and gloo would refuse."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork, ProcessGroup
from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops, sync_ops
from torch.utils._pytree import tree_leaves

from minpro_megatron.rehearsal.record import Collective

_c10d = torch.ops.c10d
# Collectives of several tensors at once, which torch's list of fake collectives lacks, and the place of the group among
# their arguments.
_COALESCED = {
    _c10d.reduce_scatter_tensor_coalesced_.default: 2,
    _c10d.allgather_into_tensor_coalesced_.default: 2,
    _c10d.allreduce_coalesced_.default: 1,
}
_GATHER, _SCATTER = _c10d._allgather_base_.default, _c10d._reduce_scatter_base_.default
_ALL_TO_ALL = _c10d.alltoall_base_.default


class Collectives:
    """`backends`: of groups by their names, as the code asked for them; NCCL if it asked for none."""

    def __init__(self) -> None:
        self.backends: dict[str, str] = {}
        self._calls: Counter[tuple[str, str, str, str, str, str, int]] = Counter()

    @property
    def found(self) -> list[Collective]:
        return [Collective(*key, count) for key, count in sorted(self._calls.items())]

    @staticmethod
    def has(operator: Any) -> bool:
        return operator in collective_ops or operator in _COALESCED

    def run(self, operator: Any, args: Any, kwargs: Any, phase: str) -> tuple[Any, list[str]]:
        """(the operator's result, what is wrong with the call)."""
        if operator in sync_ops:
            return operator(*args, **kwargs), []
        place = _COALESCED.get(operator)
        group = CollectiveOp.get_process_group(operator, args) if place is None else ProcessGroup.unbox(args[place])
        tensors = _tensors((args, kwargs))
        backend = self.backends.get(group.group_name, "nccl")
        devices = sorted({tensor.device.type for tensor in tensors})
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
        num_bytes = max((sum(tensor.nbytes for tensor in _tensors(arg)) for arg in args), default=0)
        name = operator.name().split("::")[1].partition(".")[0].strip("_")
        label = f"{group.group_desc.removesuffix('_GROUP').lower()}[{group.size()}]"
        self._calls[phase, name, label, backend, "+".join(devices), "/".join(dtypes), num_bytes] += 1
        wrong = [f"{name} over {label}: {found}" for found in _wrong(operator, args, tensors, group.size(), backend)]
        return (operator(*args, **kwargs) if place is None else FakeWork().boxed()), wrong


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _wrong(operator: Any, args: Any, tensors: Sequence[Tensor], ranks: int, backend: str) -> Iterator[str]:
    devices = {tensor.device.type for tensor in tensors}
    if backend != "gloo" and "cpu" in devices:
        yield "a host tensor is sent by NCCL"
    if backend == "gloo" and "cuda" in devices:
        yield "a CUDA tensor is sent by gloo"
    strided = [tuple(tensor.shape) for tensor in tensors if not tensor.is_contiguous()]
    if strided:
        yield f"not contiguous: {strided}"
    if operator is not _ALL_TO_ALL and len({tensor.dtype for tensor in tensors}) > 1:
        yield f"several dtypes: {sorted({str(tensor.dtype) for tensor in tensors})}"
    for large, small in _gathered_pairs(operator, args):
        if large.numel() != ranks * small.numel():
            yield f"{large.numel()} elements on one side, {ranks} x {small.numel()} on the other"
    if operator is _ALL_TO_ALL:
        for tensor, splits in ((args[0], args[3]), (args[1], args[4])):
            if splits and (len(splits) != ranks or sum(splits) != tensor.shape[0]):
                yield f"splits {list(splits)} of a tensor of {tuple(tensor.shape)} for {ranks} ranks"


def _gathered_pairs(operator: Any, args: Any) -> list[tuple[Tensor, Tensor]]:
    """(the tensor of all ranks' elements, the tensor of one rank's) for gathers and reduce-scatters."""
    if operator is _GATHER:
        return [(args[0], args[1])]
    if operator is _SCATTER:
        return [(args[1], args[0])]
    if operator is _c10d.allgather_into_tensor_coalesced_.default:
        return list(zip(args[0], args[1], strict=True))
    if operator is _c10d.reduce_scatter_tensor_coalesced_.default:
        return list(zip(args[1], args[0], strict=True))
    return []
