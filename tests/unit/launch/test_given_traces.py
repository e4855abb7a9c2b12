"""Traces that exist already: which responses of a journal are used, and with which tokens."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from minpro_megatron.errors import UserError
from minpro_megatron.launch.given_traces import GivenTraces, add_traces_of_run
from minpro_megatron.models.model_files import read_model_facts
from minpro_megatron.prompts.tokenizer import TextTokenizer
from minpro_megatron.records import NOT_SAMPLED, CollectedGroup, IssuedGroup, Prompt, Response
from minpro_megatron.tiny_model.warm_start import PAD
from tests.support.calculator_models import write_calculator_model
from tests.support.journals import collect, in_journal
from tests.support.run_examples import example_config

STOP = 1


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_calculator_model(tmp_path / "hf")


def prompt(number: int, prefix: str = "") -> Prompt:
    name = f"p{number}#prefix-0" if prefix else f"p{number}"
    return Prompt(id=name, source="s", text=f"{number}+1=", answer=str(number + 1), prefix=prefix)


class Run:
    """A run folder with a journal of the groups that are added."""

    def __init__(self, folder: Path, model: Path, right_reward: float = 1.0) -> None:
        self.folder, self.groups = folder, []
        values = example_config(folder.parent).model_dump()
        values |= {"name": folder.name, "runs_dir": str(folder.parent)}
        values["model"]["hf_path"], values["reward"]["right_reward"] = str(model), right_reward
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps(values))
        self._tokenizer = TextTokenizer(str(model), read_model_facts(str(model)))

    def add(
        self, one: Prompt, responses: Sequence[tuple[str, float]], begin: Sequence[int] = (), **fields: object
    ) -> None:
        """A group of complete responses, each with its reward."""
        ids = np.concatenate([np.asarray(begin, np.int32), *self._tokenizer.encode_all([one.text, one.prefix])])
        issued = IssuedGroup(
            group_id=len(self.groups),
            batch_index=0,
            policy_version=3,
            prompt=one,
            prompt_token_ids=ids,
            sampling_seeds=list(range(len(responses))),
        )
        made = []
        for text, reward in responses:
            (tokens,) = self._tokenizer.encode_all([text])
            made.append(response(np.append(tokens, STOP).astype(np.int32), reward, **fields))
        self.groups.append(CollectedGroup(issued=issued, responses=made))

    def traces(self, model: Path) -> GivenTraces:
        in_journal(self.folder, lambda journal: collect(journal, self.groups))
        given = GivenTraces()
        add_traces_of_run(given, self.folder, [prompt(number) for number in range(4)], str(model))
        return given


def response(token_ids: np.ndarray, reward: float, **fields: object) -> Response:
    mask = fields.get("loss_mask")
    versions = np.full(len(token_ids), 3, np.int32)
    if isinstance(mask, np.ndarray):
        versions[mask == 0] = NOT_SAMPLED
    values = {"finish_reason": "stop", "policy_versions": versions} | fields
    log_probs = np.zeros(len(token_ids), np.float32)
    return Response(token_ids=token_ids, rollout_log_probs=log_probs, reward=reward, **values)  # type: ignore[arg-type]


def test_the_first_right_response_of_each_prompt_is_its_trace(model: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "before", model)
    run.add(prompt(0), [("9,9", 0.0), ("1,2", 1.0), ("3,4", 1.0)])
    run.add(prompt(1), [("9,9", 0.5), ("9,9", -1.0)])
    run.add(prompt(0), [("5,6", 1.0)])
    given = run.traces(model)
    assert given.traces.keys() == {"p0"}
    trace = given.traces["p0"]
    assert (trace.text, trace.origin) == ("1,2", "run before")
    assert trace.token_ids is not None
    assert trace.token_ids.tolist() == run.groups[0].responses[1].token_ids[:-1].tolist()  # without the stop token


def test_a_prefixed_prompts_response_counts_with_its_prefix(model: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "before", model)
    run.add(prompt(2, prefix="1,2"), [(",3", 1.0)])
    trace = run.traces(model).traces["p2"]
    assert trace.text == "1,2,3"
    assert trace.token_ids is not None
    parts = [run.groups[0].issued.prompt_token_ids[len("2+1=") :], run.groups[0].responses[0].token_ids[:-1]]
    assert trace.token_ids.tolist() == np.concatenate(parts).tolist()


def test_the_begin_token_belongs_to_the_question(model: Path, tmp_path: Path) -> None:
    """A group without it had another prompt."""
    path = model / "tokenizer.json"
    begins = Tokenizer.from_file(str(path))
    begins.post_processor = TemplateProcessing(single=f"{PAD} $A", special_tokens=[(PAD, 0)])
    begins.save(str(path))
    run = Run(tmp_path / "before", model)
    run.add(prompt(0, prefix="1,2"), [(",3", 1.0)], begin=[0])
    run.add(prompt(1), [("1,2", 1.0)])
    given = run.traces(model)
    assert {name: trace.text for name, trace in given.traces.items()} == {"p0": "1,2,3"}
    assert given.unused == {"groups of other prompts": 1}


def test_right_is_what_that_run_called_right(model: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "before", model, right_reward=0.5)
    run.add(prompt(0), [("1", 0.25), ("2", 0.5)])
    assert run.traces(model).traces["p0"].text == "2"


def test_another_question_under_the_same_id_is_not_used(model: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "before", model)
    run.add(Prompt(id="p0", source="s", text="7+7=", answer="14"), [("14", 1.0)])
    run.add(Prompt(id="q", source="s", text="0+1=", answer="1"), [("1", 1.0)])
    given = run.traces(model)
    assert not given.traces
    assert given.unused == {"groups of other prompts": 2}


def test_truncated_responses_and_episodes_are_no_traces(model: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "before", model)
    run.add(prompt(0), [("1,2", 1.0)], finish_reason="length")
    run.add(prompt(1), [("1,2", 1.0)], loss_mask=np.asarray([1, 0, 1, 1], np.uint8))
    given = run.traces(model)
    assert not given.traces
    assert given.unused == {"correct responses that were cut off, or of several turns": 2}


def test_tokens_of_another_tokenizer_become_text(model: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "before", model)
    run.add(prompt(0), [("1,2", 1.0)])
    other = write_calculator_model(tmp_path / "other")
    path = other / "tokenizer.json"
    path.write_text(path.read_text() + "\n")  # not the same file, so not known to be the same tokens
    trace = run.traces(other).traces["p0"]
    assert (trace.text, trace.token_ids) == ("1,2", None)


def test_a_run_without_its_tokenizer_is_refused(model: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "before", model)
    run.add(prompt(0), [("1,2", 1.0)])
    (model / "tokenizer.json").rename(model / "gone.json")
    with pytest.raises(UserError, match=r"--runs .*before: its tokenizer is needed to read its tokens"):
        run.traces(model)
