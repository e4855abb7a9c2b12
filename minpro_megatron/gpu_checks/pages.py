"""The record of the checks as a Markdown page, and as the line of the README's status box."""

from minpro_megatron.gpu_checks.outcome import Figure
from minpro_megatron.gpu_checks.record import CheckResult, Record

# What no check of one GPU can show.
_NOT_ON_ONE_GPU = "NCCL between GPUs, the servers on GPUs, the image and the paper's recipes"


def record_page(record: Record) -> str:
    """The page of the record."""
    where = ", ".join(f"{name} {value}" for name, value in record.machine.items() if value)
    lines = [
        "# Checks on a GPU",
        "",
        "Written by `minpro gpu-check`; do not edit. [docs/gpu_checks.md](../docs/gpu_checks.md) explains the checks.",
        "",
        f"{record.date}, device {record.device}, commit {record.commit or 'unknown'}. {where}.",
        "",
        "| check | verdict | s | limit s | figures and limits |",
        "|---|---|---|---|---|",
        *map(_row, record.results),
    ]
    broken = [result for result in record.results if result.problems]
    if broken:
        lines += ["", "## What failed, or did not run"]
    for result in broken:
        lines += ["", f"`{result.check}` ({result.verdict}):", "", "```text", *result.problems, "```"]
    return "\n".join(lines) + "\n"


def _row(result: CheckResult) -> str:
    figures = [f"{name} {_shown(value)}" for name, value in result.figures.items() if value is not None]
    limits = [f"limits: {', '.join(result.limits)}"] if result.limits else []
    text = "; ".join([", ".join(figures), *limits]).replace("|", "\\|")
    return f"| `{result.check}` | {result.verdict} | {result.seconds:.1f} | {result.limit_s:.0f} | {text} |"


def _shown(value: Figure) -> str:
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}"


def status_line(record: Record | None) -> str:
    """What the README's status box says of GPUs, as the text of a list item."""
    if record is None:
        return (
            "*Verified on GPU*: nothing yet; no run on a GPU has been recorded. NCCL, Transformer Engine's kernels, "
            "bfloat16, the image and the paper's recipes are written but have not been run. "
            "[`minpro gpu-check`](docs/gpu_checks.md) makes the record, and [docs/limits.md](docs/limits.md) is the "
            "complete list."
        )
    ran = [*record.passed, *record.with_verdict("failed", "error")]
    gpu = record.machine.get("GPU", "GPU")
    text = (
        f"*Verified on GPU*: {len(record.passed)} of {len(ran)} checks passed on one {gpu}, "
        f"{record.date[:10]} ([record](benchmarks/gpu_checks.md), [explanation](docs/gpu_checks.md))."
    )
    if broken := record.with_verdict("failed", "error"):
        text += f" Not passed: {_listed(broken)}."
    if skipped := record.with_verdict("skipped"):
        text += f" Not run: {_listed(skipped)}."
    return f"{text} {_NOT_ON_ONE_GPU} have not been run ([docs/limits.md](docs/limits.md))."


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
