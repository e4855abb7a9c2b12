"""The stability study's grid, record, statistics and page, on made-up results with known answers."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.stability_study import grid, work
from benchmarks.stability_study.__main__ import main
from benchmarks.stability_study.analysis import (
    COMMON,
    CONTROLS,
    FAMILIES,
    PRIMARY,
    REST,
    by_seed,
    comparisons,
    variance_ratio,
    verdict,
)
from benchmarks.stability_study.grid import DELAYS, LONGEST, MAIN, NUM_STUDY_RUNS, OBJECTIVES, RATES, study_keys
from benchmarks.stability_study.measures import paired
from benchmarks.stability_study.record import StoredTrial, append, as_line, merge, read_record
from benchmarks.stability_study.report import BEGIN, END, results, write_report
from benchmarks.stability_study.trial import COMPARED, TrialKey
from minpro_megatron.objective.registry import OBJECTIVES as REGISTERED
from tests.support.stability_records import AT_START, KEY, RATE, made, made_record


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
    elsewhere = tmp_path / "elsewhere.jsonl"
    append(elsewhere, replace(runs[2], machine="another"))
    assert merge(ours, [elsewhere]) == 0  # the same numbers: the first line stays
    with pytest.raises(ValueError, match=r"different results of study minpro delay 16 seed 2.*remove the line from"):
        merge(ours, [other])
    assert ours.read_bytes() == before
    other.write_text("{}\n")
    with pytest.raises(ValueError, match=r"other\.jsonl, line 1: no run of the study"):
        read_record(other)


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


def test_equal_differences_decide_nothing() -> None:
    record = made_record(lambda _: 0.0, 8)
    for key in [key for key in record if key.delay == 4 and key.objective in ("minpro", "cppo")]:
        record[key] = made(key, 0.0)  # both collapsed, with every seed
    one = next(one for one in comparisons(record) if (one.objective, one.delay) == ("cppo", 4))
    assert (one.interval, math.isnan(one.adjusted_p)) == ((0.0, 0.0), True)
    assert verdict(*one.interval) == "undecided: no difference varies"


def test_the_relative_variance_is_compared_at_the_same_weights() -> None:
    ratio = variance_ratio(made_record(lambda _: 0.0, 3), "cispo")
    assert ratio is not None
    assert math.exp(ratio.mean) == pytest.approx(math.exp(-0.5), rel=0.05)
    assert ratio.count == 10
    assert ratio.interval()[1] < 0


def test_no_variance_ratio_is_given_if_a_run_shows_no_mean_gradient() -> None:
    record = made_record(lambda _: 0.0, 3)
    collapsed = {f"{name}/{of}": 0.0 for name in COMPARED for of in ("squared_norm", "variance")}
    noise = {"cispo/squared_norm": 5.0, "cispo/variance": 6.0, "minpro/squared_norm": 3.0, "minpro/variance": 2.0}
    for compared in ([AT_START, noise], [AT_START, collapsed], [AT_START]):
        record[KEY] = replace(record[KEY], compared=compared)
        assert variance_ratio(record, "minpro") is None
        assert variance_ratio(record, "cispo") is not None
    assert "at the weights of `minpro`: not given, a run shows no mean gradient above its noise" in results(record)
    # An update without any advantage is one of those that the mean is taken over.
    record[KEY] = replace(record[KEY], compared=[AT_START, noise | {"cispo/squared_norm": 8.0}, collapsed])
    assert variance_ratio(record, "minpro") is not None


def page_of(record: dict[TrialKey, StoredTrial], folder: Path) -> str:
    """The page that is written for a record, with text around its results."""
    path, page = folder / "study" / "results.jsonl", folder / "study.md"
    folder.mkdir(exist_ok=True)
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


def test_a_study_run_with_another_rate_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = made_record(lambda _: 0.0, 4)
    other = replace(KEY, learning_rate=5e-4)
    record[other] = made(other, 0.9)
    with pytest.raises(ValueError, match=rf"{other.name} is no run of the study, .* minpro 0\.00025.*; remove"):
        page_of(record, tmp_path)
    assert main(["status", "--record", str(tmp_path / "study" / "results.jsonl")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    record.pop(KEY)  # as many runs as the study has, but not those
    with pytest.raises(ValueError, match="is no run of the study"):
        page_of(record, tmp_path / "again")
    with pytest.raises(ValueError, match="is no run of the study, whose rates are not all chosen"):
        work.missing_keys({KEY: record[replace(KEY, seed=1)]})


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
