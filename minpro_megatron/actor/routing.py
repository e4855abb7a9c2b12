"""Routing replay: a forward pass chooses the same experts as an earlier pass of the trainer or of a server.

Between scoring and updating the weights change, and a router with almost equal scores for two experts may then choose
the other one: the ratio would compare two different networks. With R2 (arXiv:2512.01374) the updates use the experts
chosen while the behavior log-probs were computed. With R3 (arXiv:2510.11370) scoring and updates use the experts that
the server chose when it sampled, which also removes the differences between the two engines' routers from the ratio.
In both cases the router's weights still get a gradient, through the probabilities of those experts.

Megatron's RouterReplay has one action and one list for each router of the process, so both are set around every
forward of a micro-batch: between two forwards the schedule may run other micro-batches and other model chunks, and a
backward pass that recomputes a layer calls its router again, in the order of the forwards.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from minpro_megatron.batching.routes import refuse_other_routes, shard_routes, wrong_choice
from minpro_megatron.batching.row_shard import RowShard
from minpro_megatron.batching.stored_arrays import with_routes_read
from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.errors import UserError
from minpro_megatron.models.architecture import Architecture
from minpro_megatron.parallel.mesh import Mesh


class Routing(Protocol):
    """Sets up the routers around the forward of one micro-batch through one model chunk."""

    def around(self, chunk: int, micro_batch: int, num_slots: int) -> Any:
        """A context manager. `num_slots`: the number of tokens that this rank's routers process."""
        ...


class FreeRouting:
    """The routers choose the experts."""

    @contextmanager
    def around(self, chunk: int, micro_batch: int, num_slots: int) -> Iterator[None]:
        yield


@dataclass(frozen=True)
class Routes:
    """The experts chosen for this rank's slots of a mini-batch, by (chunk, micro-batch), in host memory.

    uint8 or int16 [layers of the chunk, L, experts per token]; valid for the packing that they were made with.
    """

    chosen: dict[tuple[int, int], Tensor] = field(default_factory=dict)


class RecordedRouting:
    """The routers choose the experts, and their choices are stored in `routes`."""

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
            # copied as bytes: an eighth of the size of int64 indices, and one copy instead of one per layer
            for router, indices in zip(routers, chosen.to(self._routers.device).long(), strict=True):
                router.set_target_indices(indices)
                router.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        yield
        for index, router in enumerate(routers):
            if index < self._routers.num_recomputed(chunk):
                router.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)
            else:
                router.clear_indices()  # otherwise they would accumulate until the end of the mini-batch


class RolloutRoutes:
    """Makes the routes of a mini-batch from the servers' routes in its sequences (R3)."""

    def __init__(self, routers: "ChunkRouters", architecture: Architecture, mesh: Mesh) -> None:
        """Raises ValueError for a model without experts."""
        if not architecture.num_experts:
            raise UserError(
                f"model.routing_replay = rollout: {architecture.name} has no experts; set it to none, the default"
            )
        self._routers = routers
        self._architecture = architecture
        self._mesh = mesh

    def of(self, sequences: Sequence[TokenSequence], rows: Sequence[RowShard]) -> Routes:
        """The routes for `rows`, this rank's share of the mini-batch `sequences`. Collective.

        Raises the same ValueError on every rank if routes are missing, damaged or do not match the model.
        """
        model = self._architecture
        refuse_other_routes(sequences, model.num_layers, model.num_experts, model.num_experts_per_token)
        routes, problem = Routes(), None
        for micro_batch, row in enumerate(rows):
            try:
                row = with_routes_read(row)  # a rank reads only its rows and has one of them in memory at a time
            except UserError as error:
                problem = problem or f"model.routing_replay = rollout: {error}"
                break
            for chunk, layers in enumerate(self._routers.layers):
                chosen = shard_routes(row, layers, model.num_experts, model.num_experts_per_token)
                # every rank checks its own part: together they check every route, in a fraction of the time
                problem = problem or wrong_choice(chosen, layers.start, model.num_experts)
                routes.chosen[chunk, micro_batch] = torch.from_numpy(chosen)
        for found in self._mesh.from_all_ranks(problem):
            if found:
                raise UserError(found)
        return routes


class ChunkRouters:
    """The routers of each model chunk of this rank, in the order of its layers; none for a dense model."""

    def __init__(self, chunks: Sequence[GPTModel], num_experts: int) -> None:
        self.device = next(chunks[0].parameters()).device
        self.dtype = torch.uint8 if num_experts <= 256 else torch.int16
        layers: list[list[Any]] = [list(chunk.decoder.layers) for chunk in chunks]
        mixtures = [[layer for layer in of_chunk if isinstance(layer.mlp, MoELayer)] for of_chunk in layers]
        self._by_chunk = [[layer.mlp.router.router_replay for layer in of_chunk] for of_chunk in mixtures]
        # the model's layers that they belong to, counted from 0; Megatron counts from 1
        self.layers = [
            slice(of_chunk[0].layer_number - 1, of_chunk[-1].layer_number) if of_chunk else slice(0, 0)
            for of_chunk in mixtures
        ]
        # the layers without experts are a chunk's first ones
        recomputed = _num_recomputed(chunks[0].config)
        self._num_recomputed = [
            recomputed - (len(every) - len(own)) for every, own in zip(layers, mixtures, strict=True)
        ]

    def num_recomputed(self, chunk: int) -> float:
        """The number of the chunk's first routers that backward calls again."""
        return self._num_recomputed[chunk]

    def of(self, chunk: int) -> list[RouterReplay]:
        assert None not in self._by_chunk[chunk], "the model was built without routing_replay"
        return self._by_chunk[chunk]

    def reset(self) -> None:
        """Reset the routers after a pass over a mini-batch: they replay nothing and store nothing."""
        for router in (router for routers in self._by_chunk for router in routers):
            if router is None:  # built without routing replay
                continue
            router.clear_router_replay_action()
            router.clear_indices()


def _num_recomputed(config: TransformerConfig) -> float:
    """The number of layers at the start of each chunk that are recomputed as a whole."""
    if config.recompute_granularity != "full":
        return 0
    return math.inf if config.recompute_method == "uniform" else config.recompute_num_layers or 0


def _recorded(router: RouterReplay) -> Tensor:
    indices = router.get_recorded_indices()
    assert indices is not None, "the router was not called"
    return indices
