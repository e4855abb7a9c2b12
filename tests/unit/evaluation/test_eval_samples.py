"""The sample file goes on after a crash, and holds the samples of one protocol."""

import json
from pathlib import Path

import pytest

from minpro_megatron.errors import UserError
from minpro_megatron.evaluation.samples import (
    SampledGroup,
    SampledResponse,
    SampleFile,
    text_to_compare,
    whole_text,
)
from minpro_megatron.evaluation.scores import score_all

SETTINGS = {"temperature": 1.0, "benchmarks": {"gsm8k": {"samples_per_prompt": 2}}, "seed": 0}


def group(prompt: str, first: int = 0, text: str = "12") -> SampledGroup:
    response = SampledResponse(text, 3, "stop", 1.0, extracted="12")
    return SampledGroup("gsm8k", 0, prompt, first, [response, response])


def test_what_was_appended_comes_back_in_order(tmp_path: Path) -> None:
    groups = [group("a"), group("b", text='line\n"break" é'), group("a", 2)]
    with SampleFile(tmp_path / "new", SETTINGS) as file:
        for found in groups:
            file.append(found)
        assert list(file.groups(whole_text)) == groups
    with SampleFile(tmp_path / "new", SETTINGS) as file:
        assert list(file.groups(whole_text)) == groups


def test_a_torn_line_is_dropped_and_the_file_goes_on(tmp_path: Path) -> None:
    with SampleFile(tmp_path, SETTINGS) as file:
        file.append(group("a"))
        file.append(group("b"))
    whole = (tmp_path / "samples.jsonl").read_bytes()
    (tmp_path / "samples.jsonl").write_bytes(whole[:-9])
    with SampleFile(tmp_path, SETTINGS) as file:
        assert [found.prompt_id for found in file.groups(whole_text)] == ["a"]
        file.append(group("b"))
    assert (tmp_path / "samples.jsonl").read_bytes() == whole


def test_a_group_that_stands_there_twice_counts_once(tmp_path: Path) -> None:
    with SampleFile(tmp_path, SETTINGS) as file:
        file.append(group("a", text="first"))
        file.append(group("a", text="second"))
        assert [found.responses[0].text for found in file.groups(whole_text)] == ["first"]


def test_figures_need_no_long_texts(tmp_path: Path) -> None:
    long = ["a" * 10**4, "b" * 10**4, "a" * 10**4]
    answered = [SampledResponse(text, 3, "stop", 0.0, extracted) for text, extracted in zip(long, "123", strict=True)]
    # a grader that extracts nothing: the first and the last sample give the same answer, which is not the right one
    whole = [SampledResponse(text, 3, "stop", reward) for text, reward in zip([*long, "7"], (0, 0, 0, 1), strict=True)]
    with SampleFile(tmp_path, SETTINGS) as file:
        file.append(SampledGroup("gsm8k", 0, "x", 0, answered))
        file.append(SampledGroup("own", 0, "x", 0, whole))
        kept, everything = list(file.groups(text_to_compare)), list(file.groups(whole_text))
    assert [response.text for response in kept[0].responses] == ["", "", ""]
    assert max(len(response.text) for response in kept[1].responses) < 40
    figures = [score_all("m", 0, {"seed": 0}, {"gsm8k": 3, "own": 4}, groups) for groups in (kept, everything)]
    assert figures[0] == figures[1]
    assert figures[0].benchmarks[1].majority_at_k[4].value == 0  # the wrong answer has two votes


@pytest.mark.parametrize(
    "line",
    [
        b'{"benchmark": 3}',
        b'{"benchmark": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
        b'{"unknown": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
    ],
    ids=["wrong type", "deep value", "deep unknown value"],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes) -> None:
    with SampleFile(tmp_path, SETTINGS) as file:
        file.append(group("a"))
    with (tmp_path / "samples.jsonl").open("ab") as raw:
        raw.write(line + b"\n")
    with (
        SampleFile(tmp_path, SETTINGS) as file,
        pytest.raises(UserError, match=r"samples.jsonl, line 2: .*remove the line"),
    ):
        list(file.groups(whole_text))


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    with SampleFile(tmp_path, SETTINGS) as file:
        file.append(group("a"))
    other = json.loads(json.dumps(SETTINGS)) | {"seed": 1, "top_p": 0.7}
    other["benchmarks"]["gsm8k"]["samples_per_prompt"] = 4
    with pytest.raises(ValueError, match="other settings") as caught:
        SampleFile(tmp_path, other)
    message = str(caught.value)
    for difference in ("benchmarks.gsm8k.samples_per_prompt: 2 -> 4", "seed: 0 -> 1", "top_p: None -> 0.7"):
        assert difference in message
    assert "temperature" not in message
    assert json.loads((tmp_path / "settings.json").read_text()) == SETTINGS


def test_a_folder_without_samples_takes_new_settings(tmp_path: Path) -> None:
    with SampleFile(tmp_path, SETTINGS):
        pass
    with SampleFile(tmp_path, SETTINGS | {"seed": 5}):
        pass
    assert json.loads((tmp_path / "settings.json").read_text())["seed"] == 5


def test_one_evaluation_at_a_time(tmp_path: Path) -> None:
    with SampleFile(tmp_path, SETTINGS), pytest.raises(ValueError, match="another evaluation writes here"):
        SampleFile(tmp_path, SETTINGS)
    with SampleFile(tmp_path, SETTINGS):  # free again
        pass


@pytest.mark.parametrize("entry", ["notes.md", "samples.jsonl", "settings.json", "tensorboard/events", ".git/HEAD"])
def test_a_folder_of_something_else_is_refused_and_left_as_it_is(tmp_path: Path, entry: str) -> None:
    path = tmp_path / entry
    path.parent.mkdir(exist_ok=True)
    path.write_text("no line of ours")
    with pytest.raises(ValueError, match=rf"it holds files that no evaluation wrote \({entry.partition('/')[0]}\)"):
        SampleFile(tmp_path, SETTINGS)
    assert [str(found.relative_to(tmp_path)) for found in tmp_path.rglob("*") if found.is_file()] == [entry]
    assert path.read_text() == "no line of ours"


def test_a_run_folder_is_refused_although_it_has_a_file_of_samples(tmp_path: Path) -> None:
    for name in ("samples.jsonl", "run.json", "metrics.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=r"it holds files that no evaluation wrote \(metrics.jsonl, run.json, samples"):
        SampleFile(tmp_path, SETTINGS)


def test_settings_of_another_program_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").touch()
    (tmp_path / "settings.json").write_text("[" * 10**5)
    with pytest.raises(UserError, match="not JSON"):
        SampleFile(tmp_path, SETTINGS)
    (tmp_path / "settings.json").write_text('{"editor.fontSize": 12}')
    with pytest.raises(ValueError, match="these are not the settings of an evaluation"):
        SampleFile(tmp_path, SETTINGS)
    assert "editor.fontSize" in (tmp_path / "settings.json").read_text()


def test_an_evaluation_that_ended_before_its_settings_were_written_starts_again(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").touch()
    with SampleFile(tmp_path, SETTINGS) as file:
        assert list(file.groups(whole_text)) == []
