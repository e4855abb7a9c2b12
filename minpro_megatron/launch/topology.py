"""The distribution of training, serving and collecting over the nodes of a job."""

import json
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field, ValidationError

from minpro_megatron.config.base import Section
from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import UserError
from minpro_megatron.launch.roles import gpus_together, roles_of


class TopologySettings(Section):
    """How a run is distributed over nodes. 0 nodes: as few as the GPUs allow, and one for all roles if it suffices."""

    gpus_per_node: int = Field(default=8, ge=0, description="Number of GPUs per node; 0: the nodes have no GPUs.")
    train_nodes: int = Field(default=0, ge=0)
    serve_nodes: int = Field(default=0, ge=0)
    share_nodes: bool = Field(
        default=False, description="Servers use the GPUs that training leaves free on the last of its nodes."
    )


class NodeShare(Section):
    """The share of one node: trainer ranks, the servers first_server .. first_server + num_servers - 1, the
    collector."""

    ranks: int = Field(default=0, ge=0)
    first_server: int = Field(default=0, ge=0)
    num_servers: int = Field(default=0, ge=0)
    collects: bool = False


class Topology(Section):
    """The nodes of a job in their order. Training nodes come first, so rank 0 is on node 0."""

    nodes: tuple[NodeShare, ...]

    @property
    def training_nodes(self) -> list[int]:
        return [index for index, node in enumerate(self.nodes) if node.ranks]

    @property
    def serving_nodes(self) -> list[int]:
        return [index for index, node in enumerate(self.nodes) if node.num_servers]

    @property
    def collecting_node(self) -> int | None:
        return next((index for index, node in enumerate(self.nodes) if node.collects), None)

    @property
    def deciding_nodes(self) -> list[int]:
        """The nodes whose end is the end of the run: those that do not only serve."""
        return [index for index, node in enumerate(self.nodes) if node.ranks or node.collects]

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"


def read_topology(path: Path) -> Topology:
    """What `to_json` wrote. Raises UserError."""
    try:
        return Topology.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValidationError, json.JSONDecodeError) as error:
        raise UserError(f"--topology {path}: {' '.join(str(error).split())}; submit the job again") from None


def lay_out(config: RunConfig, settings: TopologySettings) -> Topology:
    """Distributes the run's ranks and servers over nodes. Raises UserError with one line per problem."""
    roles, server = roles_of(config), config.server
    ranks = config.parallel.world_size if "train" in roles else 0
    servers = server.count if "serve" in roles and not server.urls else 0
    rank_gpus = 1 if config.device == "cuda" else 0
    server_gpus = server.tensor_parallel if server.device == "cuda" and server.engine != "reference" else 0
    demand = _Demand(config, settings, ranks, servers, rank_gpus, server_gpus)
    if problems := list(demand.problems()):
        raise UserError(problems)
    return demand.topology()


class _Demand:
    """The ranks and servers, the GPUs that each of them needs, and the nodes assigned to them."""

    def __init__(
        self,
        config: RunConfig,
        settings: TopologySettings,
        ranks: int,
        servers: int,
        rank_gpus: int,
        server_gpus: int,
    ) -> None:
        self._config, self._settings = config, settings
        self._ranks, self._servers = ranks, servers
        self._rank_gpus, self._server_gpus = rank_gpus, server_gpus
        gpus = settings.gpus_per_node
        is_chosen = settings.train_nodes or settings.serve_nodes
        self._on_one_node = not is_chosen and gpus_together(config, ranks * rank_gpus, servers * server_gpus) <= gpus
        self._train_nodes = self._nodes(ranks, rank_gpus, settings.train_nodes)
        self._serve_nodes = self._nodes(servers, server_gpus, settings.serve_nodes)
        self._shares = self._on_one_node or settings.share_nodes
        self._servers_per_node = -(-servers // self._serve_nodes) if servers else 0

    @property
    def _num_nodes(self) -> int:
        """0 without ranks and servers."""
        both = (self._train_nodes, self._serve_nodes)
        return max(both) if self._shares else sum(both)

    def _nodes(self, count: int, gpus_of_one: int, chosen: int) -> int:
        if not count:
            return 0
        if chosen or self._on_one_node or not gpus_of_one:
            return chosen or 1
        return -(-count // max(1, self._settings.gpus_per_node // gpus_of_one))

    def problems(self) -> Iterator[str]:
        config, gpus = self._config, self._settings.gpus_per_node
        if not gpus and (self._rank_gpus or self._server_gpus):
            fields = [name for name, one in (("device", self._rank_gpus), ("server.device", self._server_gpus)) if one]
            yield f"topology.gpus_per_node = 0: {' and '.join(fields)} = cuda need GPUs: give the GPUs per node"
            return
        if self._config.server.takes_turns and not self._on_one_node:
            yield (
                "server.placement = shared: trainer and servers must be on one node, and this job needs several: lower "
                "parallel.data and server.count, leave topology.train_nodes and topology.serve_nodes out, or set "
                "disaggregated"
            )
            return
        if self._ranks:
            yield from self._training_problems()
        if self._servers:
            yield from self._serving_problems()
        if self._ranks and self._servers and config.publish.transport == "shared_memory" and self._num_nodes > 1:
            yield (
                f"publish.transport = shared_memory with {self._num_nodes} nodes: the trainer can share memory only "
                "with servers on its node; set it to broadcast, or let the run fit on one node"
            )
        if self._shares and self._ranks and self._servers and not self._on_one_node:
            wanted = self._ranks // self._train_nodes * self._rank_gpus + self._servers_per_node * self._server_gpus
            if wanted > gpus:
                yield (
                    f"topology.share_nodes = true: a node would need {wanted} GPUs (ranks {self._ranks} on "
                    f"{self._train_nodes} nodes, server.count x server.tensor_parallel = {config.server.count} x "
                    f"{config.server.tensor_parallel} on {self._serve_nodes}) and has topology.gpus_per_node = {gpus}: "
                    "raise topology.train_nodes or topology.serve_nodes, or set it to false"
                )

    def _training_problems(self) -> Iterator[str]:
        parallel, gpus, nodes = self._config.parallel, self._settings.gpus_per_node, self._train_nodes
        layout = (
            f"parallel: tensor x pipeline x context x data = {parallel.tensor} x {parallel.pipeline} x "
            f"{parallel.context} x {parallel.data_size} = {self._ranks} ranks"
        )
        if self._ranks % nodes:
            yield f"{layout} do not divide evenly over {nodes} nodes: change parallel.data or set topology.train_nodes"
            return
        ranks_per_node = self._ranks // nodes
        if ranks_per_node * self._rank_gpus > gpus:
            yield (
                f"{layout} on topology.train_nodes = {nodes} are {ranks_per_node} per node, with "
                f"topology.gpus_per_node = {gpus}: give at least {-(-self._ranks // gpus)} nodes, or lower "
                "parallel.data"
            )
        if self._rank_gpus and parallel.tensor > 1 and ranks_per_node % parallel.tensor:
            yield (
                f"parallel.tensor = {parallel.tensor}: its ranks must be on one node, because they exchange "
                f"activations in every layer; it must divide the {ranks_per_node} ranks per node: lower it or change "
                "topology.train_nodes"
            )

    def _serving_problems(self) -> Iterator[str]:
        server, gpus, nodes = self._config.server, self._settings.gpus_per_node, self._serve_nodes
        if self._server_gpus > gpus:
            yield (
                f"server.tensor_parallel = {server.tensor_parallel}: a server must fit on one node, and a node has "
                f"topology.gpus_per_node = {gpus}: lower it"
            )
            return
        if (nodes - 1) * self._servers_per_node >= self._servers:
            yield f"topology.serve_nodes = {nodes}: server.count = {server.count} leaves some nodes empty: lower it"
        if self._servers_per_node * self._server_gpus > gpus:
            fitting = gpus // self._server_gpus
            yield (
                f"server.count = {server.count} on topology.serve_nodes = {nodes}: {self._servers_per_node} per node, "
                f"and only {fitting} of server.tensor_parallel = {server.tensor_parallel} fit "
                f"topology.gpus_per_node = {gpus}: give at least {-(-self._servers // fitting)} nodes"
            )

    def topology(self) -> Topology:
        num_nodes = max(1, self._num_nodes)
        first_serving = num_nodes - self._serve_nodes
        collecting = (first_serving if self._servers else 0) if "collect" in roles_of(self._config) else None
        nodes = []
        for index in range(num_nodes):
            first = (index - first_serving) * self._servers_per_node if index >= first_serving else 0
            nodes.append(
                NodeShare(
                    ranks=self._ranks // self._train_nodes if index < self._train_nodes else 0,
                    first_server=first,
                    num_servers=min(self._servers_per_node, self._servers - first) if index >= first_serving else 0,
                    collects=index == collecting,
                )
            )
        return Topology(nodes=tuple(nodes))
