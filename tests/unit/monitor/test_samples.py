"""A step's samples carry each token's importance ratio, of the right token of the right response."""

import math
from pathlib import Path

import numpy as np
import pytest

from minpro_megatron.monitor.samples import read_samples
from minpro_megatron.monitor.step_report import StepReport
from minpro_megatron.monitor.writer import RunWriter
from minpro_megatron.report import shown_samples
from minpro_megatron.report.report import write_report
from minpro_megatron.report.shown_samples import shown
from tests.support.batches import make_batch

SCALARS = {"time/step_s": 1.0, "time/wait_for_batch_s": 0.0}


def samples_of(folder: Path, log_ratios: np.ndarray | None) -> list[dict]:
    """Of a step with make_batch's 18 tokens, in mini-batches of 7 and 11."""
    with RunWriter(folder) as writer:
        report = StepReport(writer, lambda ids: " ".join(map(str, ids)))
        behavior = np.linspace(-3, -1, 18, dtype=np.float32)
        if log_ratios is not None:
            found = behavior + log_ratios.astype(np.float32)
            report.trained(behavior, [found[:7], found[7:]])
        else:
            report.trained(behavior, [])
        report.step(0, SCALARS, {}, make_batch())
    return read_samples(folder)


def test_each_token_has_its_own_ratio(tmp_path: Path) -> None:
    # responses of 5, 2; 1, 4; 3, 3 tokens: the first ones of the groups begin at tokens 0, 7 and 12
    found = samples_of(tmp_path, np.arange(18) / 10)
    assert [sample["num_tokens"] for sample in found] == [5, 1, 3]
    assert [sample["tokens"] for sample in found] == [
        ["10000", "10001", "10002", "10003", "10004"], ["20000"], ["30000", "30001", "30002"],
    ]  # fmt: skip
    for sample, first in zip(found, (0, 7, 12), strict=True):
        expected = [math.exp((first + place) / 10) for place in range(sample["num_tokens"])]
        assert sample["ratios"] == pytest.approx(expected, rel=1e-5)
    page = write_report(tmp_path).read_text()
    assert 'class="t high2" title="ratio 1.221">10002<' in page


def test_without_recorded_log_probs_the_text_is_shown(tmp_path: Path) -> None:
    found = samples_of(tmp_path, None)
    assert all("tokens" not in sample for sample in found)
    assert [sample.response for sample in shown(found)] == [sample["response"] for sample in found]


def test_ratios_that_overflow_or_are_missing_stay_numbers_or_nothing(tmp_path: Path) -> None:
    log_ratios = np.zeros(18)
    log_ratios[:3] = 1000, -1000, np.nan
    (sample, *_) = shown(samples_of(tmp_path, log_ratios))
    assert [token.color for token in sample.tokens] == ["high4", "low4", "", "", ""]
    assert [token.note for token in sample.tokens[:3]] == ["ratio 4.852e+08", "ratio 2.061e-09", "no ratio"]


def test_a_long_response_is_cut_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minpro_megatron.monitor.step_report.MAX_TOKENS", 2)
    monkeypatch.setattr(shown_samples, "MAX_TOKENS", 2)
    (sample, second, _) = shown(samples_of(tmp_path, np.zeros(18)))
    assert ([token.text for token in sample.tokens], sample.num_left_out) == (["10000", "10001"], 3)
    assert second.num_left_out == 0
