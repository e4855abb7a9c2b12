"""A plan as a picture: what trainer and servers do over some steps, and how each rank's memory is used."""

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from minpro_megatron.planning.plan import Plan
from minpro_megatron.report.figures import STYLE

PHASES = {
    "wait": ("waits for rollouts", "#e2e8f0"),
    "score": ("scores", "#0f9d76"),
    "train": ("updates", "#2563eb"),
    "publish": ("publishes", "#d97706"),
    "release": ("takes the GPUs over", "#db2777"),
    "checkpoint": ("checkpoint", "#7c3aed"),
}
SERVER_COLOR = "#64748b"
MEMORY_COLORS = {
    "weights": "#2563eb",
    "gradients": "#60a5fa",
    "optimizer": "#7c3aed",
    "activations": "#0f9d76",
    "logits or a layer's backward": "#86efac",
    "context and fragments": "#cbd5e1",
    "KV cache": "#d97706",
    "activations, CUDA graphs": "#e2e8f0",
}
SHOWN_SERVERS = 8


def draw(plan: Plan, path: Path) -> None:
    """Writes the picture; the suffix of `path` selects its format."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 6.6), layout="constrained", dpi=110)
        FigureCanvasAgg(figure)
        timeline, memory = figure.subplots(2, 1, height_ratios=[1, 1])
        _timeline(timeline, plan)
        _memory(memory, plan)
        figure.savefig(path)


def _timeline(axes: Axes, plan: Plan) -> None:
    spans, servers = plan.timeline.spans, plan.timeline.busy[:SHOWN_SERVERS]
    for span in spans:
        if span.end > span.start:
            axes.barh(0, span.end - span.start, left=span.start, height=0.8, color=PHASES[span.phase][1], linewidth=0)
            if span.phase == "train":
                middle = (span.start + span.end) / 2
                axes.text(middle, 0, str(span.step), ha="center", va="center", color="white", fontsize=8)
    for place, busy in enumerate(servers):
        for start, end in busy:
            axes.barh(place + 1, end - start, left=start, height=0.8, color=SERVER_COLOR, linewidth=0)
    names = ["trainer", *(f"server {place}" for place in range(len(servers)))]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, spans[-1].end)
    axes.set_xlabel("s since the start")
    axes.grid(visible=False, axis="y")
    used = [phase for phase in PHASES if any(span.phase == phase and span.end > span.start for span in spans)]
    handles = [Patch(color=PHASES[phase][1], label=PHASES[phase][0]) for phase in used]
    handles.append(Patch(color=SERVER_COLOR, label="generates"))
    axes.legend(handles=handles, ncols=len(handles), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    more = plan.num_servers - len(servers)
    axes.set_title(
        f"{plan.config.name}: {plan.step_s:.0f} s per step; trainer waits {plan.wait_share:.0%}, servers idle "
        f"{plan.idle_share:.0%}" + (f" ({more} more servers not drawn)" if more else ""),
        loc="left",
        pad=22,
    )


def _memory(axes: Axes, plan: Plan) -> None:
    server, limit = plan.server, plan.cluster.kind.memory_bytes
    bars = []
    for rank in plan.ranks:
        transient = rank.total - rank.states - rank.activations.saved - rank.context - rank.fragments
        parts = {
            "weights": rank.weights,
            "gradients": rank.gradients,
            "optimizer": rank.optimizer,
            "activations": rank.activations.saved,
            "logits or a layer's backward": transient,
            "context and fragments": rank.context + rank.fragments,
        }
        bars.append((f"rank of stage {rank.stage}", parts))
    rest = server.total - server.weights - server.kv_cache
    bars.append(
        (
            "a server's GPU",
            {"weights": server.weights, "KV cache": server.kv_cache, "activations, CUDA graphs": rest},
        )
    )
    for place, (_, parts) in enumerate(bars):
        left = 0.0
        for name, size in parts.items():
            axes.barh(place, size / 1e9, left=left, height=0.7, color=MEMORY_COLORS[name], linewidth=0)
            left += size / 1e9
        axes.text(left, place, f" {left:.1f}", va="center", fontsize=8)
    axes.axvline(limit / 1e9, color="#dc2626", linewidth=1.2)
    axes.text(limit / 1e9, -0.75, f"{plan.cluster.kind.name}: {limit / 1e9:.1f} GB", color="#dc2626", ha="right")
    axes.set_yticks(range(len(bars)), [name for name, _ in bars])
    axes.set_ylim(len(bars) - 0.4, -0.95)
    axes.set_xlim(0, 1.08 * max(limit / 1e9, *(sum(parts.values()) / 1e9 for _, parts in bars)))
    axes.set_xlabel("GB")
    axes.grid(visible=False, axis="y")
    used = dict.fromkeys(name for _, parts in bars for name in parts)
    axes.legend(
        handles=[Patch(color=MEMORY_COLORS[name], label=name) for name in used],
        ncols=4,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
    )
