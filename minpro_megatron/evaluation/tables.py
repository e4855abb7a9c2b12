"""The scores as Markdown tables and as TensorBoard scalars (name and value); results.json has the Scores themselves."""

from collections.abc import Callable, Sequence

from minpro_megatron.evaluation.benchmarks import title_of
from minpro_megatron.evaluation.intervals import Estimate
from minpro_megatron.evaluation.scores import BenchmarkScores, Scores, powers_of_two


def markdown(results: Sequence[Scores]) -> str:
    """Every table has one row per model: accuracy, then pass@k and maj@k of each benchmark, then the responses.

    The tables are laid out as in arXiv:2601.22718: accuracies of all benchmarks side by side with their average
    (Tables 1 and 4), pass@k over k (Table 2). Scores are in percent, with 95 % bootstrap intervals over prompts.
    """
    names = list(dict.fromkeys(scores.name for result in results for scores in result.benchmarks))
    parts = [_protocol(results[0]), _accuracies(results, names)]
    for name in names:
        parts += _over_k(results, name, "pass@k", lambda scores: scores.pass_at_k)
        parts += _over_k(results, name, "maj@k", lambda scores: scores.majority_at_k)
    parts.append(_responses(results))
    return "\n\n".join(parts) + "\n"


def scalars(result: Scores) -> dict[str, float]:
    """The TensorBoard scalars; the names are declared in metrics/metric.py."""
    values = {"evaluation/accuracy/average": result.average.value}
    for scores in result.benchmarks:
        values[f"evaluation/accuracy/{scores.name}"] = scores.accuracy.value
        values[f"evaluation/standard_error/{scores.name}"] = scores.standard_error
        values[f"evaluation/not_graded/{scores.name}"] = float(scores.ungraded_responses)
        if scores.mean_reward is not None:
            values[f"evaluation/mean_reward/{scores.name}"] = scores.mean_reward.value
        values[f"evaluation/response_length_mean/{scores.name}"] = scores.mean_response_tokens
        values[f"evaluation/truncated_fraction/{scores.name}"] = scores.truncated_fraction
        for k in powers_of_two(scores.samples_per_prompt):
            values[f"evaluation/pass_at_k/{scores.name}_{k:03d}"] = scores.pass_at_k[k].value
            values[f"evaluation/majority_at_k/{scores.name}_{k:03d}"] = scores.majority_at_k[k].value
    return values


def _protocol(result: Scores) -> str:
    sampling = result.settings
    return (
        f"Sampled at temperature {sampling['temperature']:g}, top-p {sampling['top_p']:g}, at most "
        f"{sampling['max_response_tokens']:,} tokens per response. In percent with 95 % bootstrap intervals over "
        f"prompts. A response is correct from a reward of {result.right_reward:g} on. One that could not be graded "
        "counts as wrong, and in the mean reward as 0 or the lowest reward."
    )


def _accuracies(results: Sequence[Scores], names: Sequence[str]) -> str:
    num_samples = {s.name: s.samples_per_prompt for result in results for s in result.benchmarks}
    heads = [f"{title_of(name)} avg@{num_samples[name]}" for name in names]
    rows = []
    for result in results:
        found = {scores.name: scores for scores in result.benchmarks}
        cells = [_percent(found[name].accuracy) if name in found else "-" for name in names]
        rows.append([result.model, *cells, _percent(result.average)])
    return _table("Accuracy", ["model", *heads, "Average"], rows)


def _over_k(
    results: Sequence[Scores], name: str, figure: str, choose: Callable[[BenchmarkScores], dict[int, Estimate]]
) -> list[str]:
    found = [(result.model, scores) for result in results for scores in result.benchmarks if scores.name == name]
    ks = powers_of_two(min(scores.samples_per_prompt for _, scores in found))
    if len(ks) < 2:
        return []
    rows = [[model, *(_percent(choose(scores)[k]) for k in ks)] for model, scores in found]
    return [_table(f"{title_of(name)}: {figure}", ["model", *(f"k = {k}" for k in ks)], rows)]


def _responses(results: Sequence[Scores]) -> str:
    heads = [
        "model", "benchmark", "prompts", "samples", "mean reward", "mean tokens", "cut at the limit", "no answer",
        "not graded",
    ]  # fmt: skip
    rows = [
        [
            result.model,
            title_of(scores.name),
            str(scores.num_prompts),
            str(scores.samples_per_prompt),
            "-" if scores.mean_reward is None else _plain(scores.mean_reward),
            f"{scores.mean_response_tokens:,.0f}",
            f"{100 * scores.truncated_fraction:.1f} %",
            f"{100 * scores.no_answer_fraction:.1f} %",
            str(scores.ungraded_responses),
        ]
        for result in results
        for scores in result.benchmarks
    ]
    return _table("Responses", heads, rows)


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"### {title}", "", _row(heads), "|" + "---|" * len(heads), *map(_row, rows)]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} ({100 * estimate.low:.1f}-{100 * estimate.high:.1f})"


def _plain(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ({estimate.low:.3f}-{estimate.high:.3f})"
