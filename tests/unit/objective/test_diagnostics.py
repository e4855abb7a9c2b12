"""The statistics of a mini-batch are those a loop over its tokens gives, however the tokens are spread."""

import math

import numpy as np
import pytest
import torch

from minpro_megatron.config.objective import MinproConfig
from minpro_megatron.metrics.declared import METRICS, check_declared
from minpro_megatron.metrics.histograms import histogram_quantile, merge_histograms
from minpro_megatron.metrics.metric import merge, values
from minpro_megatron.monitor.step_report import derived_metrics
from minpro_megatron.objective.corrections import OtherLogProbs
from minpro_megatron.objective.diagnostics import as_metrics, token_statistics
from minpro_megatron.objective.registry import OBJECTIVES
from tests.support.ragged_tokens import Tokens, one_sequence, prefix_minima, random_tokens

SEED = 3
LOSS = -2.5  # summed over slots, of a denominator of 7


def statistics_of(tokens: Tokens, staleness: np.ndarray, entropies: np.ndarray) -> tuple[dict, dict]:
    seen = tokens.for_objective(torch.float32)
    terms = OBJECTIVES["minpro"].terms(seen, MinproConfig())
    behavior = torch.tensor(tokens.behavior)
    others = OtherLogProbs(behavior, behavior + 0.25, torch.zeros_like(behavior), torch.zeros_like(behavior))
    found = token_statistics(
        seen, terms, torch.tensor(entropies), others, torch.tensor(staleness), (torch.tensor(LOSS), 7)
    )
    return as_metrics([found])


@pytest.fixture
def drawn() -> tuple[Tokens, np.ndarray, np.ndarray]:
    tokens, random = random_tokens(SEED), np.random.default_rng(SEED)
    count = len(tokens.mask)
    return tokens, random.integers(0, 40, count), random.random(count).astype(np.float32)


def weights_of(tokens: Tokens) -> list[float]:
    return [min(5.0, m * ratio) for m, ratio in zip(prefix_minima(tokens), tokens.ratios, strict=True)]


def test_means_and_extremes_are_those_of_a_loop(drawn: tuple) -> None:
    tokens, staleness, entropies = drawn
    trained = np.flatnonzero(tokens.mask)
    ratios = np.array(tokens.ratios)[trained]
    minima, weights = np.array(prefix_minima(tokens))[trained], np.array(weights_of(tokens))[trained]
    found = values(statistics_of(tokens, staleness, entropies)[0])
    logs = np.log(ratios)
    products = np.exp([math.fsum(np.array(tokens.log_ratios)[of]) for of in tokens.trained_of_sequences()])
    expected = {
        "ratio/sequence_mean": products.mean(),
        "ratio/sequence_square_mean": (products**2).mean(),
        "policy/entropy": entropies[trained].mean(),
        "ratio/mean": ratios.mean(),
        "ratio/min": ratios.min(),
        "ratio/max": ratios.max(),
        "ratio/square_mean": (ratios**2).mean(),
        "ratio/log_second_moment": (logs**2).mean(),
        "prefix_min/mean": minima.mean(),
        "prefix_min/min": minima.min(),
        "prefix_min/below_one": (minima < 1).mean(),
        "objective/weight_mean": weights.mean(),
        "objective/weight_square_mean": (weights**2).mean(),
        "objective/clipped_fraction": (minima * ratios > 5).mean(),
        "objective/masked_fraction": 0.0,
        "policy/kl_k1": -logs.mean(),
        "policy/kl_k2": (logs**2 / 2).mean(),
        "policy/kl_k3": (ratios - 1 - logs).mean(),
        "mismatch/log_prob_abs_mean": 0.25,
        "mismatch/log_prob_abs_max": 0.25,
        "mismatch/kl_k3": math.exp(-0.25) - 1 + 0.25,
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_the_place_of_the_smallest_ratio_is_counted_in_trained_tokens(drawn: tuple) -> None:
    tokens = drawn[0]
    places = []
    for sequence in set(tokens.sequence.tolist()):
        ratios = [r for r, m, s in zip(tokens.ratios, tokens.mask, tokens.sequence, strict=True) if m and s == sequence]
        if ratios:
            places.append(ratios.index(min(ratios)) / max(1, len(ratios) - 1))
    found = values(statistics_of(*drawn)[0])
    assert found["ratio/min_position"] == pytest.approx(np.mean(places), rel=1e-6)


def test_of_equal_smallest_ratios_the_first_is_the_place() -> None:
    tokens = one_sequence([2.0, 0.5, 3.0, 0.5, 0.5], mask=[1, 1, 0, 1, 1])
    metrics, _ = statistics_of(tokens, np.zeros(5, np.int64), np.zeros(5, np.float32))
    assert (metrics["ratio/min_position"].value, metrics["ratio/min_position"].count) == (pytest.approx(1 / 3), 1)


def products_of(tokens: Tokens) -> list[float]:
    """log(rho_1 ... rho_t) of each token, over the trained ones of its sequence."""
    sums: dict[int, float] = {}
    found = []
    for delta, trained, sequence in zip(tokens.log_ratios, tokens.mask, tokens.sequence, strict=True):
        sums[sequence] = sums.get(sequence, 0.0) + (delta if trained else 0.0)
        found.append(sums[sequence])
    return found


def by_token(tokens: Tokens) -> list[dict[str, float]]:
    """What is averaged by bucket, of each token."""
    rows = zip(weights_of(tokens), prefix_minima(tokens), tokens.ratios, products_of(tokens), strict=True)
    return [
        {
            "objective/weight": weight,
            "objective/weight_square": weight**2,
            "prefix_min/mean": minimum,
            "prefix_ratio/log": product,
            "prefix_ratio/surrogate_log": math.log(minimum * ratio),
            "prefix_ratio/gap_abs": abs(math.log(minimum * ratio) - product),
        }
        for weight, minimum, ratio, product in rows
    ]


def test_values_by_bucket_are_the_means_of_the_buckets_tokens(drawn: tuple) -> None:
    tokens, staleness, _ = drawn
    buckets: dict[str, list[float]] = {}
    seen: dict[int, int] = {}
    for row, trained, sequence, stale in zip(by_token(tokens), tokens.mask, tokens.sequence, staleness, strict=True):
        if trained:
            seen[sequence] = seen.get(sequence, 0) + 1
            first = 2 ** int(math.log2(seen[sequence]))
            for name, value in row.items():
                buckets.setdefault(f"{name}_by_position/{first}", []).append(value)
                buckets.setdefault(f"{name}_by_staleness/{min(int(stale), 16)}", []).append(value)
    found = values(statistics_of(*drawn)[0])
    assert {name for name in found if "_by_" in name} == buckets.keys()
    for name, of in buckets.items():
        assert found[name] == pytest.approx(np.mean(of), rel=1e-5), name
    derived = derived_metrics(found, {})
    for what in ("position", "staleness"):
        squares = {name: of for name, of in buckets.items() if name.startswith(f"objective/weight_square_by_{what}/")}
        assert len(squares) > 3
        for name, of in squares.items():
            size = np.mean(np.sqrt(of)) ** 2 / np.mean(of)
            bucket = name.rpartition("/")[2]
            found_size = derived[f"objective/effective_sample_size_by_{what}/{bucket}"]
            assert found_size == pytest.approx(size, rel=1e-5), name


def test_the_surrogate_is_compared_with_the_product_of_the_ratios(drawn: tuple) -> None:
    tokens = drawn[0]
    rows = [row for row, trained in zip(by_token(tokens), tokens.mask, strict=True) if trained]
    metrics, histograms = statistics_of(*drawn)
    found = values(metrics)
    for name, of in (
        ("prefix_ratio/log_mean", "log"), ("prefix_ratio/surrogate_log_mean", "surrogate_log"),
        ("prefix_ratio/gap_abs_mean", "gap_abs"),
    ):  # fmt: skip
        assert found[name] == pytest.approx(np.mean([row[f"prefix_ratio/{of}"] for row in rows]), rel=1e-5), name
    gaps = np.array([row["prefix_ratio/surrogate_log"] - row["prefix_ratio/log"] for row in rows])
    assert abs(gaps.mean()) > 0.1  # the surrogate is biased here
    derived = derived_metrics(found, histograms)
    for percent in (1, 50, 99):
        low, high = np.quantile(gaps, [max(0, percent / 100 - 0.01), min(1, percent / 100 + 0.01)])
        value = derived[f"prefix_ratio/gap_quantile_{percent:02d}"]
        assert low - 0.04 * abs(low) - 4e-4 <= value <= high + 0.04 * abs(high) + 4e-4, percent


def test_parts_merge_to_the_whole_whatever_the_split(drawn: tuple) -> None:
    tokens, staleness, entropies = drawn
    whole, whole_histograms = statistics_of(*drawn)
    parts = []
    for sequences in (range(3), range(3, 4), range(4, 12)):
        held = np.isin(tokens.sequence, list(sequences))
        part = tokens.where(held)
        parts.append(statistics_of(part, staleness[held], entropies[held]))
    merged = values(merge([metrics for metrics, _ in parts]))
    assert merged.keys() == values(whole).keys()
    for name, value in values(whole).items():
        assert merged[name] == pytest.approx(value, rel=1e-12), name
    for name, counts in merge_histograms([histograms for _, histograms in parts]).items():
        assert counts.tolist() == whole_histograms[name].tolist()


def test_quantiles_and_effective_sample_sizes_follow_from_the_merged_parts(drawn: tuple) -> None:
    tokens = drawn[0]
    metrics, histograms = statistics_of(*drawn)
    found = derived_metrics(values(metrics), histograms)
    trained = np.flatnonzero(tokens.mask)
    ratios, weights = np.array(tokens.ratios)[trained], np.array(weights_of(tokens))[trained]
    assert found["ratio/effective_sample_size"] == pytest.approx(ratios.sum() ** 2 / (ratios**2).sum() / len(ratios))
    expected = weights.sum() ** 2 / (weights**2).sum() / len(weights)
    assert found["objective/effective_sample_size"] == pytest.approx(expected, rel=1e-5)
    for name, of in (("ratio", ratios), ("prefix_min", np.array(prefix_minima(tokens))[trained])):
        for percent in (1, 50, 99):
            # between two neighbouring observations any number is a quantile: allow a rank on either side, and a bin
            low, high = np.quantile(np.log(of), [max(0, percent / 100 - 0.01), min(1, percent / 100 + 0.01)])
            value = math.log(found[f"{name}/quantile_{percent:02d}"])
            assert low - 0.04 * abs(low) - 4e-4 <= value <= high + 0.04 * abs(high) + 4e-4, (name, percent)


def test_every_statistic_is_declared(drawn: tuple) -> None:
    metrics, histograms = statistics_of(*drawn)
    check_declared([*metrics, *derived_metrics(values(metrics), histograms)])
    for name, metric in metrics.items():
        if name in METRICS:
            assert METRICS[name].reduction == metric.reduction, name
    with pytest.raises(ValueError, match="undeclared"):
        check_declared(["objective/weight_by_moon/3"])


def test_without_a_trained_token_nothing_is_observed() -> None:
    tokens = random_tokens(1, num_sequences=1)
    assert not tokens.mask.any()
    count = len(tokens.mask)
    metrics, histograms = statistics_of(tokens, np.zeros(count, np.int64), np.zeros(count, np.float32))
    assert values(metrics) == {"objective/loss": LOSS / 7}
    assert not any(counts.any() for counts in histograms.values())
    assert derived_metrics({}, histograms) == {}


def test_nan_stays_visible_in_the_means() -> None:
    tokens = random_tokens(2)
    tokens.log_probs[np.flatnonzero(tokens.mask)[3]] = np.nan
    count = len(tokens.mask)
    metrics, _ = statistics_of(tokens, np.zeros(count, np.int64), np.zeros(count, np.float32))
    for name in ("ratio/mean", "ratio/min", "ratio/max", "objective/weight_mean"):
        assert math.isnan(metrics[name].value), name


@pytest.mark.parametrize("scale", [1e-4, 0.03, 1.0, 8.0])
def test_histogram_quantiles_are_within_a_bin(scale: float) -> None:
    log_ratios = np.random.default_rng(5).normal(0, scale, 20_000).clip(-20, 20)
    count = len(log_ratios)
    tokens = Tokens(log_ratios, np.zeros(count), np.ones(count), np.ones(count), np.zeros(count, np.int64))
    _, histograms = statistics_of(tokens, np.zeros(count, np.int64), np.zeros(count))
    assert histograms["ratio/log"].sum() == count
    for share in (0.0, 0.01, 0.5, 0.9, 1.0):
        exact = float(np.quantile(log_ratios, share))
        assert histogram_quantile(histograms["ratio/log"], share) == pytest.approx(exact, rel=0.035, abs=4e-4)
