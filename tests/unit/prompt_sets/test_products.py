"""The prompts of the task of products, and what its warm start teaches."""

import random
from pathlib import Path

import pytest

from minpro_megatron.commands import tiny_model
from minpro_megatron.prompt_sets import products as prompt_set
from minpro_megatron.rewards import products
from minpro_megatron.tiny_model import warm_start


def test_the_committed_prompts_are_those_that_the_command_writes(tmp_path: Path) -> None:
    prompt_set.prepare(tmp_path)
    names = (prompt_set.TRAIN_FILE, prompt_set.HELDOUT_FILE)
    for name in names:
        assert (tmp_path / name).read_bytes() == (tiny_model.DATA_FOLDER / name).read_bytes()
    train, heldout = (warm_start.read_pairs(tmp_path / name) for name in names)
    assert (len(train), len(heldout)) == (prompt_set.NUM_TRAIN, prompt_set.NUM_HELDOUT)
    assert not set(train) & set(heldout)
    assert all(answer == products.worked(prompt) for prompt, answer in train + heldout)


def test_the_warm_start_teaches_three_turns_of_training_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_set, "NUM_SYNTHETIC", 300)
    heldout = warm_start.read_pairs(tiny_model.DATA_FOLDER / prompt_set.HELDOUT_FILE)
    pairs = warm_start.TASKS["products"].pairs(heldout)
    assert len(set(pairs)) == len(pairs) == 900
    for at_once, call, copy in zip(pairs[::3], pairs[1::3], pairs[2::3], strict=True):
        prompt, answer = at_once
        assert at_once not in heldout
        assert answer == products.worked(prompt)
        assert call == (prompt, prompt[:-1])
        assert copy == (f"{prompt}{prompt[:-1]}<eos>:{answer}=", answer)


def test_a_digit_of_calls_and_copies_is_spoiled_and_none_of_answers_at_once() -> None:
    generator = random.Random(0)
    at_once, call, copy = ("347*581=", "201607"), ("347*581=", "347*581"), ("347*581=347*581<eos>:201607=", "201607")
    places = set()
    for pair in (call, copy):
        for share in (0.0, 0.3, 1.0):
            wrong = 0
            for _ in range(600):
                read, written = prompt_set.spoiled(pair, share, generator)
                assert (read, len(written)) == (pair[0], len(pair[1]))
                differing = [place for place, (old, new) in enumerate(zip(pair[1], written, strict=True)) if old != new]
                assert len(differing) <= 1
                assert all(written[place].isdigit() for place in differing)
                wrong += len(differing)
                places |= {(pair, place) for place in differing}
            assert abs(wrong / 600 - share) < 0.07
    assert len(places) == 6 + 6  # every digit
    assert all(prompt_set.spoiled(at_once, 1.0, generator) == at_once for _ in range(100))
