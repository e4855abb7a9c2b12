"""From samples to figures and tables, on samples whose figures are known."""

import re

import msgspec
import pytest

from minpro_megatron.evaluation.samples import SampledGroup, SampledResponse
from minpro_megatron.evaluation.scores import Scores, answers_of, powers_of_two, score_all
from minpro_megatron.evaluation.tables import markdown, scalars
from minpro_megatron.metrics.declared import check_declared
from minpro_megatron.report.pass_at_k_chart import Curve, pass_at_k_png

SETTINGS = {"temperature": 1.0, "top_p": 0.7, "max_response_tokens": 20480, "seed": 0}


def sampled(answer: str | None, right: bool, tokens: int = 10, reason: str = "stop", text: str = "") -> SampledResponse:
    return SampledResponse(text, tokens, reason, float(right), answer)


# Prompt p: 1 of 4 right, most say 7; prompt q: all right. The second group of p comes first.
GROUPS = [
    SampledGroup("aime24", 3, "p", 2, [sampled("7", False), sampled(None, False, 30, "length")]),
    SampledGroup("aime24", 3, "q", 0, [sampled("1/2", True), sampled("0.5", True)]),
    SampledGroup("own", 3, "x", 0, [sampled(None, True, text="5"), sampled(None, False, text="6")]),
    SampledGroup("aime24", 3, "q", 2, [sampled("\\frac12", True), sampled("0.50", True)]),
    SampledGroup("aime24", 3, "p", 0, [sampled("12", True, 20), sampled("7", False)]),
]
SAMPLES = {"aime24": 4, "own": 2}


def scores(model: str = "runs/x/hf_export") -> Scores:
    return score_all(model, 3, SETTINGS, SAMPLES, GROUPS)


def test_figures_of_known_samples() -> None:
    aime, own = scores().benchmarks
    assert (aime.name, aime.num_prompts, aime.samples_per_prompt) == ("aime24", 2, 4)
    assert aime.accuracy.value == (0.25 + 1) / 2
    assert [aime.pass_at_k[k].value for k in (1, 2, 3, 4)] == pytest.approx([0.625, 0.75, 0.875, 1.0])
    assert sorted(aime.majority_at_k) == [1, 2, 4]
    assert aime.majority_at_k[1].value == pytest.approx(0.625)
    assert aime.majority_at_k[4].value == 0.5  # p: 7 wins; q: right
    assert aime.mean_response_tokens == (10 + 30 + 20 + 10 + 4 * 10) / 8
    assert aime.truncated_fraction == 1 / 8
    assert aime.no_answer_fraction == 1 / 8
    # a grader that extracts nothing compares whole responses: 5 and 6 have a vote each
    assert own.no_answer_fraction == 0
    assert own.majority_at_k[2].value == 0.5
    assert scores().average.value == (0.625 + 0.5) / 2


def test_the_order_of_arrival_changes_nothing() -> None:
    groups = [
        SampledGroup("own", 0, f"p{i}", 0, [sampled("1", i % 3 == 0), sampled("2", i % 2 == 0)]) for i in range(7)
    ]
    found = score_all("m", 0, SETTINGS, {"own": 2}, groups)
    assert score_all("m", 0, SETTINGS, {"own": 2}, groups[3:] + groups[:3]) == found
    assert score_all("m", 3, SETTINGS, SAMPLES, GROUPS[::-1]) == score_all("m", 3, SETTINGS, SAMPLES, GROUPS)


def test_prompts_without_all_their_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="aime24: not every prompt has its 4 samples"):
        answers_of("aime24", GROUPS[:-1], 4)
    with pytest.raises(ValueError, match="other: not every prompt"):
        answers_of("other", GROUPS, 4)


def test_responses_that_could_not_be_graded_are_counted() -> None:
    broken = SampledResponse("9" * 9, 5, "stop", None, None, "grader died")
    groups = [SampledGroup("own", 0, "x", 0, [broken, sampled("5", True)])]
    (own,) = score_all("m", 0, SETTINGS, {"own": 2}, groups).benchmarks
    assert own.ungraded_responses == 1
    assert own.no_answer_fraction == 0.5
    # a file of an earlier version has a reward of 0 with the problem: no more than a wrong answer's -1
    old = msgspec.structs.replace(broken, reward=0.0)
    for of_old in (broken, old):
        graded = [SampledResponse("", 5, "stop", reward, "1") for reward in (-1.0, 1.0, -1.0)]
        groups = [SampledGroup("own", 0, "x", 0, [of_old, *graded])]
        (own,) = score_all("m", 0, SETTINGS, {"own": 4}, groups).benchmarks
        assert (own.accuracy.value, own.mean_reward and own.mean_reward.value) == (0.25, -0.5)
        assert own.ungraded_responses == 1
    with pytest.raises(ValueError, match="own: none of its responses could be graded: grader died"):
        score_all("m", 0, SETTINGS, {"own": 1}, [SampledGroup("own", 0, "x", 0, [broken])])


def test_right_is_what_the_right_reward_says() -> None:
    responses = [SampledResponse("", 5, "stop", reward, "1") for reward in (3.0, 9.0, 10.0, -2.0)]
    found = score_all("m", 0, SETTINGS, {"own": 4}, [SampledGroup("own", 0, "x", 0, responses)], right_reward=9.0)
    (own,) = found.benchmarks
    assert (own.accuracy.value, own.mean_reward and own.mean_reward.value) == (0.5, 5.0)
    assert "A response is correct from a reward of 9 on" in markdown([found])


def test_a_model_that_never_answers() -> None:
    silent = SampledResponse("so", 5, "length", 0.0)
    groups = [SampledGroup("own", 0, "x", 0, [silent, silent])]
    (own,) = score_all("m", 0, SETTINGS, {"own": 2}, groups).benchmarks
    assert (own.no_answer_fraction, own.majority_at_k[2].value, own.accuracy.value) == (1.0, 0.0, 0.0)


def test_results_survive_json() -> None:
    found = scores()
    assert msgspec.json.decode(msgspec.json.encode(found), type=Scores) == found


def test_tables_have_a_row_a_model_and_a_column_a_benchmark() -> None:
    text = markdown([scores("before"), scores("after|x")])
    lines = text.splitlines()
    accuracy = lines[lines.index("### Accuracy") :]
    assert accuracy[2] == "| model | AIME24 avg@4 | own avg@2 | Average |"
    assert re.fullmatch(r"\| before \| 62\.5 \(25\.0-100\.0\) \| 50\.0 \(50\.0-50\.0\) \| 56\.2 \(.*\) \|", accuracy[4])
    assert accuracy[5].startswith("| after\\|x | 62.5 ")
    over_k = lines[lines.index("### AIME24: pass@k") :]
    assert over_k[2] == "| model | k = 1 | k = 2 | k = 4 |"
    assert [cell.split()[0] for cell in over_k[4].split("|")[2:5]] == ["62.5", "75.0", "100.0"]
    assert "### own: maj@k" in lines
    assert "| before | AIME24 | 2 | 4 | 0.625 (0.250-1.000) | 14 | 12.5 % | 12.5 % | 0 |" in lines
    assert "temperature 1, top-p 0.7, at most 20,480 tokens" in lines[0]


def test_a_table_of_models_with_other_benchmarks_has_gaps() -> None:
    only_own = score_all("small", 0, SETTINGS, {"own": 2}, GROUPS)
    lines = markdown([scores(), only_own]).splitlines()
    assert lines[lines.index("### Accuracy") + 5].startswith("| small | - | 50.0 ")
    assert lines[lines.index("### AIME24: pass@k") + 5] == ""  # one row only


def test_scalars_are_declared() -> None:
    found = scalars(scores())
    check_declared(found)
    assert found["evaluation/accuracy/aime24"] == 0.625
    assert found["evaluation/accuracy/average"] == 0.5625
    assert (found["evaluation/mean_reward/aime24"], found["evaluation/not_graded/aime24"]) == (0.625, 0)
    assert found["evaluation/pass_at_k/aime24_002"] == pytest.approx(0.75)
    assert found["evaluation/majority_at_k/aime24_004"] == 0.5


def test_powers_of_two_end_with_the_number_itself() -> None:
    assert powers_of_two(1) == [1]
    assert powers_of_two(128) == [1, 2, 4, 8, 16, 32, 64, 128]
    assert powers_of_two(6) == [1, 2, 4, 6]


def test_the_picture_shows_every_benchmark() -> None:
    curve = [0.2 + 0.04 * k for k in range(16)]
    wide = Curve("A", curve, [value - 0.1 for value in curve], [value + 0.1 for value in curve])
    drawn = pass_at_k_png([wide], "m")
    assert drawn.startswith(b"\x89PNG")
    assert drawn != pass_at_k_png([wide, Curve("B", [0.5], [0.4], [0.6])], "m")
