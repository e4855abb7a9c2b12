"""The memory plan of a conversion on a terminal: the parameters and bytes of the ranks of each pipeline stage."""

from rich.box import SIMPLE
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.weights.plan import Plan, RankKind

DEGREES = tuple(axis for axis in ParallelConfig.axes() if axis not in ("data", "pipeline_layers"))


def print_plan(console: Console, plan: Plan) -> None:
    mesh = plan.parallel
    degrees = ", ".join(f"{axis} {getattr(mesh, axis)}" for axis in DEGREES if getattr(mesh, axis) > 1)
    experts = f" (of experts by {plan.expert_optimizer_ranks})" if plan.architecture.num_experts else ""
    console.print(
        f"{plan.architecture.name}, {plan.parameters:,} parameters: {plan.hf_tensors_covered:,} tensors covered, "
        f"{len(plan.hf_tensors_missed):,} missed, {len(plan.hf_tensors_absent):,} absent",
        f"{mesh.world_size} ranks: {degrees or 'no cut'}, data {mesh.data_size}; "
        f"optimizer states cut by {plan.optimizer_ranks}{experts}",
        sep="\n",
        highlight=False,
        soft_wrap=True,
    )
    columns = ("stage", "ranks", "layers", "parameters", "weights", "gradients", "optimizer", "total")
    table = Table(*columns, box=SIMPLE, padding=(0, 0, 0, 1), title="each rank of a pipeline stage")
    for column in table.columns[1:]:
        column.justify = "right"
    for kind in plan.rank_kinds:
        table.add_row(*_cells(kind))
    console.print(table)


def _cells(kind: RankKind) -> list[str]:
    first, last = kind.stages[0], kind.stages[-1]
    sizes = (kind.weight_bytes, kind.gradient_bytes, kind.optimizer_bytes, kind.total_bytes)
    return [
        str(first) if first == last else f"{first}-{last}",
        str(kind.num_ranks),
        str(kind.layers),
        f"{kind.parameters:,}",
        *map(decimal, sizes),
    ]
