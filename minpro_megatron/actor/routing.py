"""Routing replay: a later forward pass of the same micro-batches chooses the same experts as an earlier one.

Between scoring and updating the weights change, and a router on the edge between two experts may choose the other one:
the ratio then compares two different networks. With R2 (arXiv:2512.01374) the updates use the experts chosen while the
behavior log-probs were computed; the router's weights still get a gradient, through the probabilities of those experts.

Megatron's RouterReplay holds one action and one list for each router of the process, so both are set around every
forward of a micro-batch: between two of them the schedule may run other micro-batches and other model chunks, and a
backward pass that recomputes a layer asks its router again, in the order of the forwards.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from torch import Tensor


class Routing(Protocol):
    """What is done about the routers around the forward of one micro-batch through one model chunk."""

    def around(self, chunk: int, micro_batch: int, num_slots: int) -> Any:
        """A context manager. `num_slots`: the tokens that this rank's routers see."""
        ...


class FreeRouting:
    """The routers choose."""

    @contextmanager
    def around(self, chunk: int, micro_batch: int, num_slots: int) -> Iterator[None]:
        yield


@dataclass(frozen=True)
class Routes:
    """The experts chosen for this rank's slots of a mini-batch, by (chunk, micro-batch), in host memory.

    uint8 or int16 [layers of the chunk, L, experts a token]; valid for the packing they were recorded with.
    """

    chosen: dict[tuple[int, int], Tensor] = field(default_factory=dict)


class RecordedRouting:
    """The routers choose, and what they choose is kept in `routes`."""

    def __init__(self, routers: "ChunkRouters") -> None:
        self._routers = routers
        self.routes = Routes()

    @contextmanager
    def around(self, chunk: int, micro_batch: int, num_slots: int) -> Iterator[None]:
        routers = self._routers.of(chunk)
        for router in routers:
            router.set_router_replay_action(RouterReplayAction.RECORD)
        yield
        if not routers:
            return
        chosen = torch.stack([_recorded(router) for router in routers])
        self.routes.chosen[chunk, micro_batch] = chosen.to(self._routers.dtype).cpu()
        for router in routers:
            router.clear_router_replay_action()
            router.clear_indices()


class ReplayedRouting:
    """The routers follow `routes`."""

    def __init__(self, routers: "ChunkRouters", routes: Routes) -> None:
        self._routers = routers
        self._routes = routes

    @contextmanager
    def around(self, chunk: int, micro_batch: int, num_slots: int) -> Iterator[None]:
        routers = self._routers.of(chunk)
        if routers:
            assert (chunk, micro_batch) in self._routes.chosen, f"no routes of chunk {chunk}, micro-batch {micro_batch}"
            chosen = self._routes.chosen[chunk, micro_batch]
            assert len(chosen) == len(routers), f"routes of {len(chosen)} layers for {len(routers)}"
            assert chosen.shape[1] == num_slots, f"routes of {chosen.shape[1]} tokens for {num_slots}"
            # moved as bytes and at once: eight times less than as indices, and one copy instead of one a layer
            for router, indices in zip(routers, chosen.to(self._routers.device).long(), strict=True):
                router.set_target_indices(indices)
                router.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        yield
        for router in routers:
            if self._routers.recomputed:
                router.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)
            else:
                router.clear_indices()  # else they would pile up until the end of the mini-batch


class ChunkRouters:
    """The routers of each model chunk of this rank, in the order of its layers; none for a dense model."""

    def __init__(self, chunks: Sequence[GPTModel], num_experts: int) -> None:
        self.device = next(chunks[0].parameters()).device
        self.recomputed = chunks[0].config.recompute_granularity == "full"  # routers are asked again in backward
        self.dtype = torch.uint8 if num_experts <= 256 else torch.int16
        layers: list[list[Any]] = [list(chunk.decoder.layers) if num_experts else [] for chunk in chunks]
        self._of_chunk = [[layer.mlp.router.router_replay for layer in of_chunk] for of_chunk in layers]

    def of(self, chunk: int) -> list[RouterReplay]:
        assert None not in self._of_chunk[chunk], "the model was built without routing_replay"
        return self._of_chunk[chunk]

    def forget(self) -> None:
        """After a pass over a mini-batch: no router follows or remembers anything."""
        for router in (router for routers in self._of_chunk for router in routers):
            if router is None:  # built without routing replay
                continue
            router.clear_router_replay_action()
            router.clear_indices()


def _recorded(router: RouterReplay) -> Tensor:
    indices = router.get_recorded_indices()
    assert indices is not None, "the router was not asked"
    return indices
