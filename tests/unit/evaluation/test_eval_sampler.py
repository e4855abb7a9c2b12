"""A task of an evaluation: sampled, turned into text beside the event loop, graded with its prefix, kept."""

import asyncio
import json
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from minpro_megatron.config.run import with_overrides
from minpro_megatron.evaluation.samples import SampledGroup, SampleFile, whole_text
from minpro_megatron.fleet.generation import GroupCollector
from minpro_megatron.prompts.prompts import TokenizedPrompt
from minpro_megatron.prompts.tokenizer import TextTokenizer
from minpro_megatron.records import Prompt
from minpro_megatron.rewards.graders import SampledText
from minpro_megatron.rewards.judging import Judged
from minpro_megatron.roles.evaluate import Sampler, plan
from minpro_megatron.serving.answers import SampledSequence
from tests.support.run_examples import example_config

CHARACTERS = ["<unk>", "<eos>", *"0123456789+="]
IDS = {character: number for number, character in enumerate(CHARACTERS)}


def write_model(folder: Path) -> Path:
    """What a tokenizer of single characters needs."""
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"vocab_size": 64, "eos_token_id": 1, "max_position_embeddings": 64})
    )
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": IDS, "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


class Member:
    """A server that answers every request with the same responses."""

    key = ("", 0)
    responses = ("4", "5")

    async def generate(self, *_: object) -> list[SampledSequence]:
        ids = [np.asarray([IDS[text], 1], dtype=np.int32) for text in self.responses]
        return [SampledSequence(one, np.zeros(2, np.float32), np.zeros(2, np.int32), "stop", None) for one in ids]


class Fleet:
    async def acquire(self, *_: object) -> Member:
        return Member()

    def release(self, *_: object) -> None: ...

    def count(self, _: str) -> None: ...


class Rewards:
    def __init__(self) -> None:
        self.texts: list[str] = []

    async def judge(self, prompt: Prompt, responses: Sequence[SampledText]) -> list[Judged]:
        self.texts += [response.text for response in responses]
        return [Judged(float(response.text == prompt.answer)) for response in responses]


def sampled(folder: Path, prefix: str, graders: Rewards) -> SampledGroup:
    """The group that the sampler keeps of a prompt whose two responses are "4" and "5"."""
    model = write_model(folder / "hf")
    config = with_overrides(example_config(folder), [f"model.hf_path={model}"])
    prompt = Prompt(id="x", source="s", text="20+4=", answer="24", prefix=prefix)
    (task,) = plan({"b": [TokenizedPrompt(prompt, np.asarray([4], np.int32))]}, {"b": 2}, seed=0)
    told: list[SampledGroup] = []

    async def sample(file: SampleFile) -> None:
        sampler = Sampler(config, 0, file, told.append, lambda: None)
        groups = GroupCollector(Fleet(), graders, sampler._tokenizer)  # type: ignore[arg-type]
        await sampler._sample(task, 3, groups, graders)  # type: ignore[arg-type]

    with SampleFile(folder / "out", {}) as file:
        asyncio.run(sample(file))
        assert list(file.groups(whole_text)) == told
    (group,) = told
    return group


@pytest.mark.parametrize(("prefix", "rewards"), [("", [0.0, 0.0]), ("2", [1.0, 0.0])])
def test_a_given_prefix_is_graded_and_not_kept(tmp_path: Path, prefix: str, rewards: list[float]) -> None:
    graders = Rewards()
    group = sampled(tmp_path, prefix, graders)
    assert graders.texts == [prefix + "4", prefix + "5"]
    assert [response.reward for response in group.responses] == rewards
    assert [response.text for response in group.responses] == ["4", "5"]
    assert group.policy_version == 3


def test_texts_are_made_beside_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group may have 150,000 tokens, and the answers of other groups come meanwhile."""
    threads: list[int] = []
    original = TextTokenizer.response_texts

    def noted(self: TextTokenizer, responses: Sequence[np.ndarray]) -> list[str]:
        threads.append(threading.get_ident())
        return original(self, responses)

    monkeypatch.setattr(TextTokenizer, "response_texts", noted)
    sampled(tmp_path, "", Rewards())
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()
