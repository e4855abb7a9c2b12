"""Prefixes for PrefixRL: which traces are taken, where they are cut, what rows come of it, and when sampling ends."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from minpro_megatron.commands import prefixes
from minpro_megatron.evaluation.samples import SampledGroup, SampledResponse, SampleFile
from minpro_megatron.launch import own_prompts, prefix_prompts
from minpro_megatron.launch.given_traces import GivenTraces
from minpro_megatron.launch.own_prompts import PROMPTS
from minpro_megatron.launch.prefix_prompts import PrefixWork, first_right_responses, next_tasks
from minpro_megatron.prompt_sets.prefixes import Cuts, Texts, Trace, cut_places, prefixes_of, training_rows
from minpro_megatron.prompts.prompts import TokenizedPrompt, load_prompts
from minpro_megatron.records import Prompt
from tests.support.calculator_models import write_calculator_model

CUTS = Cuts(count=3, shortest=0.4, longest=0.8, seed=0)


class EndsMatter:
    """A token is a character; "f" and "h" at the very end of a text are other tokens than elsewhere."""

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.asarray([ord(c) for c in text[:-1]] + [ord(text[-1]) + 1000 * (text[-1] in "fh")]) for text in texts]

    def text(self, token_ids: np.ndarray) -> str:
        return "".join(chr(number % 1000) for number in token_ids.tolist())


class Bytes:
    """A token is a byte of UTF-8: a cut may lie inside a character."""

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def text(self, token_ids: np.ndarray) -> str:
        return bytes(token_ids.tolist()).decode(errors="replace")


def prompt(number: int, pass_rate: float | None = None) -> Prompt:
    return Prompt(id=f"p{number}", source="test", text=f"{number}+1=", answer=str(number + 1), pass_rate=pass_rate)


def tokenized(count: int) -> list[TokenizedPrompt]:
    return [TokenizedPrompt(prompt(number), np.asarray([3, 4], np.int32)) for number in range(count)]


def group(prompt_id: str, first: int, *responses: tuple[str, float, str]) -> SampledGroup:
    made = [SampledResponse(text, len(text), reason, reward) for text, reward, reason in responses]
    return SampledGroup(PROMPTS, 0, prompt_id, first, made)


def test_the_first_right_response_is_the_trace() -> None:
    groups = [
        group("a", 2, ("late", 1.0, "stop"), ("later", 1.0, "stop")),
        group("a", 0, ("wrong", 0.0, "stop"), ("early", 1.0, "stop")),
        group("b", 0, ("cut off", 1.0, "length"), ("nearly", 0.5, "stop")),
        group("c", 0, ("wrong", -1.0, "stop"), ("", 1.0, "stop")),
    ]
    assert first_right_responses(groups) == {"a": "early", "c": ""}
    assert first_right_responses(reversed(groups)) == {"a": "early", "c": ""}


def test_sampling_goes_on_only_where_nothing_is_right_and_not_for_ever() -> None:
    prompts = tokenized(3)
    asked = next_tasks(prompts, [], 20, seed=0)
    assert Counter(task.group.prompt.id for task in asked) == {"p0": 4, "p1": 4, "p2": 4}  # 8 samples, 2 a request
    groups = [group(task.group.prompt.id, task.first_sample, *[("w", 0.0, "stop")] * 2) for task in asked]
    solved = [*groups[:-1], group("p2", 6, ("w", 0.0, "stop"), ("r", 1.0, "stop"))]
    again = next_tasks(prompts, solved, 20, seed=0)
    assert Counter(task.group.prompt.id for task in again) == {"p0": 4, "p1": 4}
    assert {task.first_sample for task in again} == {8, 10, 12, 14}
    # a round that was interrupted is completed first
    partly = [*solved, group("p0", 8, *[("w", 0.0, "stop")] * 2)]
    assert {task.key for task in next_tasks(prompts, partly, 20, seed=0)} == {
        task.key for task in again if task.key != (PROMPTS, "p0", 8)
    }
    whole = solved + [group(task.group.prompt.id, task.first_sample, *[("w", 0.0, "stop")] * 2) for task in again]
    last = next_tasks(prompts, whole, 20, seed=0)
    assert {task.first_sample for task in last} == {16, 18}
    whole += [group(task.group.prompt.id, task.first_sample, *[("w", 0.0, "stop")] * 2) for task in last]
    assert next_tasks(prompts, whole, 20, seed=0) == []
    seeds = [seed for task in asked + again + last for seed in task.group.sampling_seeds]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [(15, range(6, 13)), (10, range(4, 9)), (5, range(2, 5)), (2, range(1, 2)), (1, range(1, 1)), (0, range(1, 0))],
)
def test_cuts_lie_between_40_and_80_percent_of_the_tokens(num_tokens: int, expected: range) -> None:
    assert list(cut_places(num_tokens, CUTS)) == list(expected)


def test_rounding_does_not_move_a_bound() -> None:
    assert list(cut_places(10, Cuts(3, 0.7, 0.7, 0))) == [7]
    assert list(cut_places(100, Cuts(3, 0.28, 0.29, 0))) == [28, 29]
    assert list(cut_places(3, Cuts(3, 0.01, 0.99, 0))) == [1, 2]


def cut_texts(trace: str, prompt_id: str, tokenizer: Texts, cuts: Cuts = CUTS) -> list[str]:
    return [one.text for one in prefixes_of(Trace(trace), prompt_id, tokenizer, cuts)]


def test_all_places_are_equally_likely() -> None:
    trace, seen = "abcdefghijklmno", Counter()  # 15 tokens of a byte each
    for number in range(1400):
        cut = cut_texts(trace, f"p{number}", Bytes())
        assert cut == sorted(set(cut), key=len)
        assert len(cut) == 3
        assert all(trace.startswith(text) for text in cut)
        seen.update(len(text) for text in cut)
    assert set(seen) == set(range(6, 13))
    assert all(abs(count - 600) < 75 for count in seen.values())  # 4 standard deviations of 1400 draws at 3/7


def test_cuts_depend_on_seed_and_id_alone() -> None:
    trace = "abcdefghijklmno"
    first = cut_texts(trace, "p", Bytes())
    assert cut_texts(trace, "p", Bytes()) == first
    others = [cut_texts(trace, f"q{number}", Bytes()) for number in range(5)]
    reseeded = [cut_texts(trace, "p", Bytes(), Cuts(3, 0.4, 0.8, seed)) for seed in range(1, 6)]
    assert any(other != first for other in others)
    assert any(other != first for other in reseeded)


def test_no_cut_lies_inside_a_character() -> None:
    trace = "ab€€cd€€ef"  # 3 bytes each
    for number in range(50):
        for text in cut_texts(trace, f"p{number}", Bytes()):
            assert trace.startswith(text)
            assert 0.4 * 18 <= len(text.encode()) <= 0.8 * 18
    assert cut_texts("€", "p", Bytes(), Cuts(3, 0.1, 0.9, 0)) == []


def test_a_prefix_has_the_tokens_that_the_trace_begins_with() -> None:
    """Places 4 to 8 of 10 tokens; at 6 and 8 the text alone would be other tokens."""
    for number in range(20):
        assert cut_texts("abcdefghij", f"p{number}", EndsMatter()) == ["abcd", "abcde", "abcdefg"]


def test_rows_are_three_prefixed_to_one_plain_and_a_run_reads_them(tmp_path: Path) -> None:
    prompts = [prompt(0, pass_rate=0.25), prompt(1), prompt(2)]
    traces = {"p0": Trace("abcdefghij"), "p2": Trace("xy", origin="run before")}
    prefixes = {name: prefixes_of(trace, name, Bytes(), CUTS) for name, trace in traces.items()}
    rows = training_rows(prompts, traces, prefixes)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = load_prompts(path, "data.train_file")
    assert [one.id for one in read] == ["p0", "p0#prefix-0", "p0#prefix-1", "p0#prefix-2", "p2", "p2#prefix-0"]
    assert [one.prefix for one in read if one.id.startswith("p2")] == ["", "x"]  # too short for three
    assert read[0] == prompts[0]
    # the pass rate is the plain prompt's
    assert all(one.prefix and one.pass_rate is None for one in read[1:4])
    assert all((one.text, one.answer) == (prompts[0].text, prompts[0].answer) for one in read[:4])
    assert [row["trace"]["from"] for row in rows if "prefix" in row] == ["sampled"] * 3 + ["run before"]
    assert all(row["trace"]["given"] == len(row["prefix"]) for row in rows if "prefix" in row)


def test_a_row_keeps_its_system_message_and_metadata() -> None:
    """The chat template presents the one, and the reward reads the other."""
    whole = Prompt(id="p", source="s", text="?", answer="1", system="Be brief.", metadata={"level": [1, None]})
    trace = Trace("abcdefghij")
    rows = training_rows([whole], {"p": trace}, {"p": prefixes_of(trace, "p", Bytes(), CUTS)})
    assert len(rows) == 4
    assert all((row["system"], row["metadata"]) == ("Be brief.", {"level": [1, None]}) for row in rows)


def test_a_trace_is_cut_between_the_tokens_that_were_sampled() -> None:
    """Sampled tokens need not be those that the text has by itself; a cut is made only where both are the same."""
    sampled = np.asarray([ord("a"), ord("b"), ord("c"), ord("f") + 1000, ord("g"), ord("h") + 1000], np.int32)
    cuts = Cuts(count=5, shortest=0.01, longest=0.99, seed=0)
    found = prefixes_of(Trace("abcfgh", token_ids=sampled), "p", EndsMatter(), cuts)
    # after 4 tokens the text ends with the f that was sampled; after 5, f is inside the text and another token
    assert [(one.text, one.num_tokens, one.trace_tokens) for one in found] == [
        ("a", 1, 6),
        ("ab", 2, 6),
        ("abc", 3, 6),
        ("abcf", 4, 6),
    ]


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command's options for a model of random weights; sampling is replaced by what stands in `sampled`."""
    model = write_calculator_model(tmp_path / "hf")
    rows = [{"id": f"p{n}", "source": "s", "prompt": f"{n}+1=", "answer": "7"} for n in range(3)]
    (tmp_path / "hard.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    async def sample(work: object, file: SampleFile) -> None:
        file.append(group("p0", 0, ("1,2,3,4,5,6,7", 1.0, "stop"), ("8", 0.0, "stop")))
        for number in (1, 2):
            file.append(group(f"p{number}", 0, ("8", 0.0, "stop"), ("8", 0.0, "stop")))

    monkeypatch.setattr(prefix_prompts, "sample_rounds", sample)
    monkeypatch.setattr(own_prompts, "grader_problems", lambda *given: [])  # it starts a process
    names = {"--model": model, "--prompts": tmp_path / "hard.jsonl", "--output": tmp_path / "out.jsonl"}
    options = [str(part) for pair in names.items() for part in pair]
    options += ["--max-prompt-tokens", "16", "--max-response-tokens", "32"]
    return [*options, "--max-samples", "2", "--reward", "calculator", "--engine", "reference"]


def test_the_command_writes_rows_plain_rows_and_a_report(given: list[str], tmp_path: Path) -> None:
    others = ["--plain-output", str(tmp_path / "plain.jsonl"), "--demonstrations", str(tmp_path / "sft.jsonl")]
    assert prefixes.main([*given, *others]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [("prefix" in row, row["prompt"]) for row in rows] == [(False, "0+1=")] + [(True, "0+1=")] * 3
    assert [json.loads(line) for line in (tmp_path / "plain.jsonl").read_text().splitlines()] == rows[:1]
    demonstrations = [json.loads(line) for line in (tmp_path / "sft.jsonl").read_text().splitlines()]
    assert demonstrations == [rows[0] | {"response": "1,2,3,4,5,6,7", "trace": "sampled"}]
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report == {"prompts": 3, "samples": 6, "plain_rows": 1, "prefixed_rows": 3}


def test_other_cuts_sample_nothing_again(given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prefixes.main(given) == 0
    first = (tmp_path / "out.jsonl").read_text()

    async def sample(*_: object) -> None:
        raise AssertionError("sampled again")

    monkeypatch.setattr(prefix_prompts, "sample_rounds", sample)
    assert prefixes.main(given) == 0
    assert (tmp_path / "out.jsonl").read_text() == first
    assert prefixes.main([*given, "--prefixes", "1", "--longest", "0.5"]) == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


def test_more_samples_and_other_sources_resume(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the message for too few correct responses advises keeps the samples so far."""
    assert prefixes.main(given) == 0

    async def sample(work: PrefixWork, file: SampleFile) -> None:
        asked = work.next_tasks(prefix_prompts.read_groups(file, 1.0))
        assert {task.key for task in asked} == {(PROMPTS, f"p{n}", first) for n in (1, 2) for first in (2, 4, 6)}
        file.append(group("p1", 2, ("1,2,3,4,5,6,7", 1.0, "stop"), ("8", 0.0, "stop")))

    monkeypatch.setattr(prefix_prompts, "sample_rounds", sample)
    assert prefixes.main([*given, "--max-samples", "8"]) == 0
    assert json.loads((tmp_path / "out.report.json").read_text())["plain_rows"] == 2

    def add(given_traces: GivenTraces, *_: object) -> None:
        given_traces.traces["p2"] = Trace("3,4,5,6,7", "texts")

    monkeypatch.setattr(prefix_prompts, "add_traces_of_texts", add)
    assert prefixes.main([*given, "--max-samples", "0", "--texts", str(tmp_path / "texts.jsonl")]) == 0
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert (report["plain_rows"], report["samples"]) == (3, 8)


def test_an_environment_is_refused(given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A response of several turns has the environment's answers between them, which no prefix could repeat."""
    episodes = ["--environment", "python_tool", "--max-turns", "2", "--chat-template"]
    assert prefixes.main([*given, *episodes]) == 2
    assert "--environment = 'python_tool': a trace is one turn" in capsys.readouterr().err
    assert not (tmp_path / "out.samples").exists()


def test_what_would_fail_after_the_servers_have_started_is_found_before(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    urls = ["--urls", "http://127.0.0.1:9", "--api-key-variable", "A_VARIABLE_THAT_IS_NOT_SET"]
    assert prefixes.main([*given, *urls]) == 2
    assert "A_VARIABLE_THAT_IS_NOT_SET" in capsys.readouterr().err
    monkeypatch.setattr(own_prompts, "grader_problems", lambda *given: ["--reward: broken on a row of --prompts"])
    assert prefixes.main(given) == 2
    assert "--reward: broken on a row of --prompts" in capsys.readouterr().err
    assert not (tmp_path / "out.samples").exists()


def test_the_limit_on_open_files_is_raised_before_sampling(given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    raised = []
    monkeypatch.setattr(prefix_prompts, "raise_file_limit", raised.append)
    assert prefixes.main(given) == 0
    assert len(raised) == 1


def test_wrong_input_is_reported_in_one_line(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prefixes.main([*given, "--reward", "nothing"]) == 2
    assert "error: --reward = 'nothing'" in capsys.readouterr().err
    row = {"id": "p9", "source": "s", "prompt": "9+1=", "answer": "0", "prefix": "1"}
    (tmp_path / "hard.jsonl").write_text(json.dumps(row) + "\n")
    assert prefixes.main(given) == 2
    assert "'p9' has a prefix already" in capsys.readouterr().err
    (tmp_path / "hard.jsonl").write_text(json.dumps(row | {"id": "p8", "prefix": ""}) + "\n")
    assert prefixes.main([*given, "--samples-folder", str(tmp_path / "new")]) == 2
    assert "no prompt has a correct response: raise --max-samples" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [
        ("--shortest", "0.9", "--shortest 0.9 exceeds --longest 0.8"),
        ("--longest", "1", "'1' is not a share between 0 and 1"),
        ("--shortest", "nan", "'nan' is not a share"),
        ("--prefixes", "0", "'0' is not a whole number above 0"),
    ],
)
def test_impossible_cuts_are_refused(
    given: list[str], option: str, value: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        prefixes.main([*given, option, value])
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--output", "hard.jsonl"], "--output {0}/hard.jsonl is the file of --prompts, which it would replace"),
        (["--plain-output", "out.jsonl"], "--plain-output {0}/out.jsonl is the file of --output, which"),
        (["--demonstrations", "texts.jsonl", "--texts", "texts.jsonl"], "--demonstrations {0}/texts.jsonl is the file"),
        (["--demonstrations", "out.report.json"], "the report of --output {0}/out.report.json is the file of --demon"),
    ],
)
def test_no_file_is_written_in_place_of_another(
    given: list[str], arguments: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (tmp_path / "hard.jsonl").read_bytes()
    (tmp_path / "texts.jsonl").write_text('{"id": "p0", "response": "7"}\n')
    assert prefixes.main([*given, *(str(tmp_path / one) if "." in one else one for one in arguments)]) == 2
    assert problem.format(tmp_path) in capsys.readouterr().err
    assert (tmp_path / "hard.jsonl").read_bytes() == before
    assert not (tmp_path / "out.samples").exists()
