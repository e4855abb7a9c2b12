"""The stability study's grid, record, statistics and page, on made-up results with known answers."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from scipy.stats import false_discovery_control, ttest_rel

from benchmarks.stability_study import grid, work
from benchmarks.stability_study.__main__ import main
from benchmarks.stability_study.analysis import (
    COMMON,
    CONTROLS,
    FAMILIES,
    PRIMARY,
    REST,
    by_seed,
    collapse,
    comparisons,
    steps_to_collapse,
    variance_ratio,
    verdict,
)
from benchmarks.stability_study.grid import DELAYS, LONGEST, MAIN, NUM_STUDY_RUNS, OBJECTIVES, RATES, study_keys
from benchmarks.stability_study.measures import collapse_version, difference, holm, last_third, paired
from benchmarks.stability_study.record import StoredTrial, append, as_line, merge, primary_metric, read_record
from benchmarks.stability_study.report import BEGIN, END, write_report
from benchmarks.stability_study.trial import TrialKey
from minpro_megatron.objective.registry import OBJECTIVES as REGISTERED

KEY = TrialKey("study", "minpro", 16, 0, 2.5e-4)
RATE: dict[str, float] = dict.fromkeys(OBJECTIVES, 2.5e-4)


def made(key: TrialKey, accuracy: float, log_variance: float = 0.0) -> StoredTrial:
    """A run whose accuracy is constant after its start; MinPRO's relative variance is exp(log_variance) of CISPO's."""
    gradients = {"cispo/squared_norm": 2.0, "cispo/variance": 6.0, "minpro/squared_norm": 1.0}
    return StoredTrial(
        key, "setup", "machine", 30, 5, None, [0.1, *[accuracy] * 6], {"reward": [accuracy] * 6},
        {"prefix_min/mean_by_position/1": 1.0, "prefix_min/mean_by_position/32": 0.6,
         "prefix_ratio/gap_abs_by_position/1": 0.0, "prefix_ratio/gap_abs_by_position/32": 0.4},
        [gradients | {"minpro/variance": 3.0 * math.exp(log_variance)}],
    )  # fmt: skip


def made_record(advantage: Callable[[TrialKey], float], seed: int, noise: float = 0.02) -> dict[TrialKey, StoredTrial]:
    """A complete record: accuracy 0.6 + advantage(key) + the seed's part + noise."""
    random = np.random.default_rng(seed)
    of_seed = random.normal(0, 0.1, 10)
    keys = [
        TrialKey("selection", objective, LONGEST, place, rate)
        for objective in OBJECTIVES for rate in RATES for place in grid.SELECTION_SEEDS
    ]  # fmt: skip
    record = {key: made(key, 0.5 + 0.1 * (key.learning_rate == 2.5e-4)) for key in keys}
    for key in study_keys(RATE):
        accuracy = 0.6 + advantage(key) + of_seed[key.seed] + random.normal(0, noise)
        record[key] = made(key, float(accuracy), -0.5 + random.normal(0, 0.05))
    return record


def test_the_grid_has_the_protocols_seeds() -> None:
    every = study_keys(RATE)
    assert len(set(every)) == len(every) == NUM_STUDY_RUNS == 9 * 3 * 5 + 4 * 5 + 4 * 10
    keys, common = ([key for key in every if key.stage == stage] for stage in ("study", grid.COMMON_STAGE))
    assert {(key.objective, key.seed) for key in common} == {(name, seed) for name in MAIN for seed in range(10)}
    assert {(key.delay, key.learning_rate) for key in common} == {(LONGEST, 5e-4)}
    assert set(OBJECTIVES) <= REGISTERED.keys()
    for objective in OBJECTIVES:
        for delay in DELAYS:
            seeds = [key.seed for key in keys if (key.objective, key.delay) == (objective, delay)]
            assert seeds == list(range(10 if objective in MAIN and delay == LONGEST else 5))
    assert not {key.seed for key in keys} & set(grid.SELECTION_SEEDS)


def test_a_rate_is_tried_beyond_the_best_twice_at_most() -> None:
    means = {rate: -rate for rate in RATES}
    assert grid.next_rates({}) == RATES
    assert grid.next_rates(dict(list(means.items())[1:])) == RATES[:1]  # not before all of them are there
    for _ in range(grid.EXTENSIONS):
        (rate,) = grid.next_rates(means)
        assert rate == min(means) / 2
        means[rate] = -rate
    assert grid.next_rates(means) == ()
    assert grid.chosen_rate({1.0: 0.5, 2.0: 0.7, 3.0: 0.7}) == 2.0


def test_the_study_waits_for_every_rate_and_an_interrupted_one_goes_on() -> None:
    record = dict[TrialKey, StoredTrial]()
    order = list[TrialKey]()
    while missing := work.missing_keys(record):
        key = missing[0]
        assert key not in record
        order.append(key)
        # minpro's best rate is the largest of all, that of others 2.5e-4
        best = key.learning_rate if key.objective == "minpro" else -abs(math.log(key.learning_rate / 2.5e-4))
        record[key] = made(key, best)
    stages = [key.stage for key in order]
    assert stages == sorted(stages)  # selection before study, and that before the common rate
    assert stages.count("study") + stages.count(grid.COMMON_STAGE) == NUM_STUDY_RUNS
    assert stages.count("selection") == 2 * (4 * 9 + grid.EXTENSIONS)
    assert work.chosen_rates(record) == RATE | {"minpro": 4 * max(RATES)}
    assert {key.learning_rate for key in order if key.stage == "study" and key.objective == "minpro"} == {
        4 * max(RATES)
    }


def test_a_claimed_run_is_left_to_the_process_that_has_it(tmp_path: Path) -> None:
    with work.claimed(tmp_path, KEY) as first, work.claimed(tmp_path, KEY) as second:
        assert (first, second) == (True, False)
    with work.claimed(tmp_path, KEY) as again:
        assert again


def test_records_survive_a_cut_and_merge_if_they_agree(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.jsonl", tmp_path / "theirs.jsonl"
    runs = [made(replace(KEY, seed=seed), 0.1 * seed) for seed in range(3)]
    append(ours, runs[0])
    with ours.open("a") as file:
        file.write(as_line(runs[1])[:-20])  # a process was killed
    assert list(read_record(ours).values()) == runs[:1]
    append(ours, runs[1])
    append(theirs, runs[1])
    append(theirs, runs[2])
    assert merge(ours, [theirs]) == 1
    assert list(read_record(ours).values()) == runs
    assert merge(ours, [theirs]) == 0
    other = tmp_path / "other.jsonl"
    append(other, replace(runs[2], heldout=[0.0]))
    before = ours.read_bytes()
    with pytest.raises(ValueError, match="different results of study minpro delay 16 seed 2"):
        merge(ours, [other])
    assert ours.read_bytes() == before
    other.write_text("{}\n")
    with pytest.raises(ValueError, match=r"other\.jsonl, line 1: no run of the study"):
        read_record(other)


def test_the_primary_metric_is_the_last_thirds_mean_and_0_after_an_end() -> None:
    run = replace(made(KEY, 0.0), heldout=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    assert last_third(range(0, 31, 5), run.heldout) == primary_metric(run) == pytest.approx(0.65)
    ended = replace(run, heldout=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6], ended_at=27)
    assert primary_metric(ended) == pytest.approx(0.3)
    assert collapse(ended) == 30
    assert collapse(replace(ended, heldout=[0.0, 0.0], ended_at=7)) == 7
    assert (collapse(run), steps_to_collapse(run)) == (None, 30)


def test_a_dip_that_recovers_is_no_collapse() -> None:
    versions = [0, 5, 10, 15, 20]
    assert collapse_version(versions, [0.2, 0.8, 0.3, 0.5, 0.3]) == 20
    assert collapse_version(versions, [0.2, 0.8, 0.3, 0.3, 0.1]) == 10
    assert collapse_version(versions, [0.2, 0.8, 0.3, 0.5, 0.4]) is None


def test_intervals_cover_and_p_values_are_students() -> None:
    random = np.random.default_rng(1)
    for count, comparisons_made in ((5, 1), (10, 1), (5, 21)):
        draws = random.normal(0.3, 1.0, (4000, count))
        covered = [
            low < 0.3 < high for low, high in (difference(list(row)).interval(comparisons_made) for row in draws)
        ]
        expected = 1 - 0.05 / comparisons_made
        assert abs(fmean(covered) - expected) < 4 * math.sqrt(expected * (1 - expected) / 4000)
    ours, theirs = random.normal(0.5, 0.1, 6), random.normal(0.4, 0.1, 6)
    found = paired(dict(enumerate(ours)), dict(enumerate(theirs)) | {9: 5.0})  # seed 9 has no partner
    expected = ttest_rel(ours, theirs)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.interval() == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert math.isnan(difference([0.3]).p_value)
    assert difference([0.3]).interval() == (-math.inf, math.inf)


def test_holm_keeps_the_error_rate_of_a_family() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # Holm 1979, worked out by hand
    assert holm([math.nan, 0.02])[1] == pytest.approx(0.04)
    random = np.random.default_rng(2)
    families = random.random((2000, 21))
    wrong = fmean(min(holm(list(family))) < 0.05 for family in families)
    assert abs(wrong - 0.05) < 4 * math.sqrt(0.05 * 0.95 / 2000)
    # never below the adjustment that controls less, the false discovery rate
    assert all((np.array(holm(list(row))) >= false_discovery_control(row) - 1e-12).all() for row in families[:50])


def test_the_families_have_every_comparison_once() -> None:
    cells = [cell for family, cells in FAMILIES.items() if family != COMMON for cell in cells]
    assert sorted(cells) == sorted((name, delay) for name in OBJECTIVES if name != "minpro" for delay in DELAYS)
    assert len(set(cells)) == len(cells)
    assert (PRIMARY, len(CONTROLS), len(REST)) == (("cispo", 16), 2, 21)
    assert FAMILIES[COMMON] == (PRIMARY, *CONTROLS)


def test_a_planted_effect_is_found_and_none_is_not() -> None:
    def planted(key: TrialKey) -> float:
        return 0.06 if key.objective in ("minpro", "shuffled_minpro") and key.delay == LONGEST else 0.0

    found = {(one.family, one.objective, one.delay): one for one in comparisons(made_record(planted, 5))}
    primary = found["primary", "cispo", LONGEST]
    assert primary.difference.mean == pytest.approx(0.06, abs=0.02)
    assert (primary.difference.count, verdict(*primary.interval)) == (10, "for")
    assert verdict(*found["controls", "scaled_cispo", LONGEST].interval) == "for"
    assert verdict(*found["controls", "shuffled_minpro", LONGEST].interval) != "for"  # the control does as well
    assert found["others", "grpo", LONGEST].difference.count == 5
    assert found["others", "cispo", 0].adjusted_p > 0.05
    assert verdict(*found[COMMON, "cispo", LONGEST].interval) == "for"


def test_the_common_rate_compares_its_own_runs_only() -> None:
    def planted(key: TrialKey) -> float:
        return 0.1 if (key.objective, key.stage) == ("minpro", grid.COMMON_STAGE) else 0.0

    found = {(one.family, one.objective): one for one in comparisons(made_record(planted, 7))}
    assert verdict(*found[COMMON, "scaled_cispo"].interval) == "for"
    assert verdict(*found["controls", "scaled_cispo"].interval) != "for"


def test_without_an_effect_the_primary_claim_is_made_in_one_study_of_forty() -> None:
    verdicts = []
    for seed in range(300):
        record = {key: run for key, run in made_record(lambda _: 0.0, seed).items() if key.delay == LONGEST}
        one = paired(by_seed(record, "minpro", LONGEST), by_seed(record, "cispo", LONGEST))
        verdicts.append(verdict(*one.interval()))
    share = verdicts.count("for") / len(verdicts)
    assert share < 0.025 + 4 * math.sqrt(0.025 * 0.975 / 300)
    assert verdicts.count("against: no relevant advantage") > 200  # noise of 0.02 is small enough to exclude 0.03


def test_the_relative_variance_is_compared_at_the_same_weights() -> None:
    ratio = variance_ratio(made_record(lambda _: 0.0, 3), "cispo")
    assert math.exp(ratio.mean) == pytest.approx(math.exp(-0.5), rel=0.05)
    assert ratio.count == 10
    assert ratio.interval()[1] < 0


def page_of(record: dict[TrialKey, StoredTrial], folder: Path) -> str:
    """The page that is written for a record, with text around its results."""
    path, page = folder / "study" / "results.jsonl", folder / "study.md"
    for trial in record.values():
        append(path, trial)
    page.write_text(f"before\n{BEGIN}\nformer\n{END}\nafter\n")
    for _ in range(2):  # the second time changes nothing
        write_report(path, path.parent)
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n\n")
    assert text.endswith(f"\n\n{END}\nafter\n")
    return text.split(BEGIN)[1].split(END)[0].strip()


def test_a_page_without_all_runs_draws_no_conclusion(tmp_path: Path) -> None:
    record = made_record(lambda _: 0.0, 4)
    record.pop(KEY)
    text = page_of(record, tmp_path)
    assert text.startswith(f"**{NUM_STUDY_RUNS - 1} of {NUM_STUDY_RUNS} runs of the study are in the record**")
    assert "complete for 9 of 9" in text
    assert "\n" not in text
    assert not (tmp_path / "study" / "tables.md").exists()


def test_runs_of_different_setups_are_not_compared(tmp_path: Path) -> None:
    record = {KEY: made(KEY, 0.5), (other := replace(KEY, seed=1)): replace(made(other, 0.5), setup="another")}
    with pytest.raises(ValueError, match="has runs of 2 setups, another, setup; keep one"):
        page_of(record, tmp_path)


def test_the_page_of_a_complete_record(tmp_path: Path) -> None:
    text = page_of(made_record(lambda key: 0.08 * (key.objective == "minpro"), 6), tmp_path)
    tables = (tmp_path / "study" / "tables.md").read_text()
    primary = re.search(r"\| primary \| `cispo` \| 16 \| 10 \| \+0\.0[6-9]\d \| .* \| for \|", text)
    assert primary is not None
    assert primary[0] in tables
    assert text.count("| controls |") == 2
    assert text.count("| common rate |") == 3
    assert "| others |" not in text
    assert tables.count("| others |") == len(REST)
    assert tables.count("**0.00025: 0.600**") == len(OBJECTIVES)
    assert f"| machine | {NUM_STUDY_RUNS + 72} |" in tables
    assert (tmp_path / "study" / "heldout.png").stat().st_size > 20_000


def test_wrong_commands_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    with pytest.raises(SystemExit):
        main(["merge", "--record", str(record)])
    assert "merge needs the files to add" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "none.jsonl"), "--record", str(record)]) == 1
    assert "there is no such file" in capsys.readouterr().err
    append(record, made(KEY, 0.5))
    assert main(["repeat", "2", "--record", str(record)]) == 1
    assert f"2: give the number of a line of {record}, 1 to 1" in capsys.readouterr().err
    assert main(["repeat", "1", "--record", str(record)]) == 1
    assert "its setup setup is not today's" in capsys.readouterr().err
    record.unlink()
    assert main(["status", "--record", str(record)]) == 0
    assert f"0 of {NUM_STUDY_RUNS} runs of the study; next: selection minpro" in capsys.readouterr().out
