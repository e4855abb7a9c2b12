"""A plan on a terminal."""

import math
from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from minpro_megatron.planning.cost_model import StepCost
from minpro_megatron.planning.evaluations import ASSUMED_PROMPTS
from minpro_megatron.planning.first_checkpoint import first_checkpoint
from minpro_megatron.planning.modes import ModeTime
from minpro_megatron.planning.parameters import active_parameters, model_parameters
from minpro_megatron.planning.plan import Plan
from minpro_megatron.planning.problems import least_recomputation
from minpro_megatron.planning.routes import batches_with_routes
from minpro_megatron.planning.turns import TurnMemory
from minpro_megatron.planning.workload import Workload


def print_plan(console: Console, plan: Plan, modes: Sequence[ModeTime] = ()) -> None:
    _heading(console, plan)
    for table in (_rank_table(plan), _other_memory_table(plan), _step_table(plan)):
        console.print(table)
    if plan.turns:
        console.print(_turn_table(plan.turns, plan.cluster.kind.memory_bytes))
    if plan.splits:
        console.print(_split_table(plan))
    if modes:
        console.print(_mode_table(modes))
    for problem in plan.problems:
        console.print(f"[bold red]does not fit:[/] {escape(problem)}", soft_wrap=True)
    if not plan.problems:
        console.print(f"[bold green]fits[/]; settings: {' '.join(plan.settings)}", highlight=False, soft_wrap=True)
        if less := least_recomputation(plan.config, plan.architecture, plan.cluster.kind.memory_bytes):
            console.print(f"fits with less recomputation too: {less}", highlight=False, soft_wrap=True)


def _heading(console: Console, plan: Plan) -> None:
    a, config, mesh, kind = plan.architecture, plan.config, plan.config.parallel, plan.cluster.kind
    axes = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor")
    degrees = ", ".join(f"{axis} {getattr(mesh, axis)}" for axis in axes if getattr(mesh, axis) > 1)
    settings = config.staleness
    mode = f"delay {settings.delay_steps}" if settings.mode == "delay" else f"bounded {settings.max_staleness}"
    load = plan.workload
    servers = f"{plan.num_servers} servers of {config.server.tensor_parallel}"
    if plan.turns:
        servers += ", in turns on the same GPUs"
    console.print(
        f"{config.name}: {a.name}, {_number(model_parameters(a))} parameters, {_number(active_parameters(a))} per "
        f"token; {mode}",
        f"{kind.name}, {plan.cluster.node_size} per node: {mesh.world_size} train ({degrees or 'no cut'}, data "
        f"{mesh.data_size}), {servers}",
        f"per step: {config.batch.num_prompts} prompts x {config.batch.responses_per_prompt} responses in "
        f"{config.batch.updates_per_step} updates; assumed {load.mean_prompt_tokens:.0f} prompt and "
        f"{load.mean_response_tokens:.0f} response tokens on average (at most {config.sampling.max_response_tokens:,})"
        + _episodes(load),
        sep="\n",
        highlight=False,
        soft_wrap=True,
    )


def _episodes(load: Workload) -> str:
    if load.episodes is None:
        return ""
    turns, tokens, seconds = load.episodes.mean_turns, load.episodes.answer_tokens, load.episodes.answer_s
    return f", in {turns:.3g} turns with answers of {tokens} tokens after {seconds:g} s"


def _number(count: float) -> str:
    """A large number with three significant digits or more: 30.53 billion, 1.24 million, 512."""
    for size, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if count >= size:
            return f"{count / size:.2f} {name}"
    return f"{count:.0f}"


def _table(title: str, *columns: str) -> Table:
    table = Table(*columns, box=SIMPLE, padding=(0, 0, 0, 1), title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _rank_table(plan: Plan) -> Table:
    limit = decimal(plan.cluster.kind.memory_bytes)
    columns = ("stage", "weights", "gradients", "optimizer", "kept", "routed", "logits", "other", "total")
    table = _table(f"memory of a trainer rank, of {limit}; activations: kept, routed, logits", *columns)
    for rank in plan.ranks:
        sizes = (
            rank.weights,
            rank.gradients,
            rank.optimizer,
            rank.activations.saved - rank.activations.at_the_end + rank.activations.backward - rank.activations.routed,
            rank.activations.routed,
            rank.activations.logits,
            rank.workspaces + rank.context + rank.fragments,
            rank.total,
        )
        table.add_row(str(rank.stage), *map(decimal, sizes))
    return table


def _other_memory_table(plan: Plan) -> Table:
    table = _table("other memory", "where", "what", "size")
    server, host = plan.server, plan.host
    of_host = decimal(plan.cluster.kind.host_memory_bytes)
    rows = [
        ("a server's GPU", "weights", decimal(server.weights)),
        ("", f"KV cache, {server.kv_tokens:,} tokens, {plan.max_running} responses at once", decimal(server.kv_cache)),
        ("", "a bucket of new weights", decimal(server.update)),
        (f"a trainer node's host, of {of_host}", "snapshots of weights for scoring", decimal(host.snapshots)),
        ("", "copy of a checkpoint to write", decimal(host.checkpoint)),
        ("", "optimizer offload", decimal(host.offloaded)),
        ("", "states of the trainer while servers sample", decimal(host.parked)),
        ("", "routes and kept ids", decimal(host.routes)),
        ("", "buckets of new weights in shared memory", decimal(host.buckets)),
        ("", f"{host.ranks} ranks and all of it", decimal(host.total)),
    ]
    if plan.route_file_bytes:
        batches = batches_with_routes(plan.config)
        rows.append(
            ("the run folder's disk", f"routes and kept ids of {batches} batches", decimal(plan.route_file_bytes))
        )
    table.columns[1].justify = "left"
    for row in rows:
        table.add_row(*row)
    return table


def _step_table(plan: Plan) -> Table:
    cost = plan.cost
    table = _table("a global step", "part", "s", "of it")
    table.columns[2].justify = "left"
    table.add_row("generation (servers)", _seconds(plan.generation_s), "first group's start to the last one's end")
    table.add_row("scoring", _seconds(cost.score), "behavior log-probs")
    table.add_row(f"{cost.updates} updates", _seconds(cost.train), _update_parts(cost))
    moved = f"states to the host and back, with the release: {_seconds(cost.moving)}" if plan.turns else ""
    table.add_row("publishing", _seconds(cost.publish), moved)
    if plan.turns:
        table.add_row("release", _seconds(cost.release), "servers release their memory, states return to the GPUs")
    every = plan.steps_between_checkpoints
    of_it = f"every {every} steps" if every else "none before the end"
    table.add_row("checkpoint", _seconds(cost.checkpoint), f"{of_it}; {_first_checkpoint(plan)}")
    table.add_section()
    table.add_row(
        "step",
        _seconds(plan.step_s),
        f"trainer waits {plan.wait_share:.0%} of it; servers have no work {plan.idle_share:.0%} of it, and their slots "
        f"are used to {plan.slot_share:.0%}",
        style="bold",
    )
    table.add_row("on average", _seconds(plan.mean_step_s), "with the run's evaluations and checkpoints")
    cost = plan.evaluation
    table.add_row(
        "evaluation",
        _seconds(cost.seconds),
        f"{cost.responses:,} responses, {cost.share_of_responses:.0%} of all; {cost.times} times, each makes the run "
        f"{_seconds(cost.added_s)} s longer"
        + "".join(f"; assumed {ASSUMED_PROMPTS} prompts of {name}, whose file is not here" for name in cost.assumed),
    )
    return table


def _first_checkpoint(plan: Plan) -> str:
    first = first_checkpoint(plan)
    planned = f"the first is complete after {first.planned / 3600:.1f} h; " if math.isfinite(first.planned) else ""
    return f"{planned}if the time limit ends the job early, one is complete after {first.earliest / 3600:.1f} h"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds < 10 else f"{seconds:.1f}" if seconds < 100 else f"{seconds:.0f}"


def _update_parts(cost: StepCost) -> str:
    parts = {
        "products": cost.products,
        "routing": cost.routing,
        "communication": cost.communication,
        "computed again": cost.again,
        "pipeline bubble": cost.bubble,
        "waiting for the busiest ranks": cost.imbalance,
        "optimizer": cost.optimizer,
    }
    return ", ".join(f"{name} {_seconds(seconds)}" for name, seconds in parts.items() if seconds >= 0.005)


def _split_table(plan: Plan) -> Table:
    table = _table("splits", "train", "serve", "s per step")
    for split in plan.splits:
        seconds = _seconds(split.step_s) if math.isfinite(split.step_s) else "does not fit"
        serve = "the same" if split.in_turns else str(split.server_gpus)
        table.add_row(str(split.trainer_gpus), serve, seconds)
    return table


def _turn_table(turns: TurnMemory, limit: int) -> Table:
    table = _table(f"memory of a shared GPU, of {decimal(limit)}", "moment", "total")
    table.add_row("training, servers released", decimal(turns.training))
    table.add_row("servers receive weights", decimal(turns.receiving))
    table.add_row("canaries: whole servers, the trainer's weights", decimal(turns.canaries))
    table.add_row("sampling, the trainer's states in host memory", decimal(turns.sampling))
    return table


def _mode_table(modes: Sequence[ModeTime]) -> Table:
    columns = ("mode", "steps", "s per step", "trainer waits", "servers idle", "slots used", "")
    table = _table("other staleness; a delay of more than 1 does not shorten a step", *columns)
    for mode in modes:
        table.add_row(
            mode.mode,
            str(mode.steps),
            _seconds(mode.step_s),
            f"{mode.wait_share:.0%}",
            f"{mode.idle_share:.0%}",
            f"{mode.slot_share:.0%}",
            "" if mode.fits else "does not fit",
        )
    return table
