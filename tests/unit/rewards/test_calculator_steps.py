"""The calculator's long task: its arithmetic, its chains, and a grade for all steps or none."""

import random
from pathlib import Path

import pytest

from minpro_megatron.commands import tiny_model
from minpro_megatron.prompt_sets import calculator_steps as prompt_set
from minpro_megatron.rewards import calculator_steps
from minpro_megatron.tiny_model import warm_start


def test_the_meter_stops_at_its_ends() -> None:
    for reading in range(10):
        for operand in range(10):
            clipped = {"+": sorted([0, reading + operand, 9])[1], "-": sorted([0, reading - operand, 9])[1]}
            assert set(clipped) == set(calculator_steps.OPERATORS)
            for operator, value in clipped.items():
                assert calculator_steps.step(reading, operator, operand) == value


def test_a_chain_is_worked_off_from_left_to_right() -> None:
    assert calculator_steps.worked("3+4-9+5=") == "7,0,5"
    assert calculator_steps.operations_of("3+4-9=") == (3, [("+", 4), ("-", 9)])


@pytest.mark.parametrize("prompt", ["", "=", "3+4", "3+=", "3+4x2=", "12+4=", "3+4==", "٣+4="])
def test_what_is_no_chain_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match=r"prompt: .* not a chain|operator: "):
        calculator_steps.worked(prompt)


def test_drawn_prompts_are_chains_with_every_operator_and_digit() -> None:
    generator = random.Random(0)
    drawn = [calculator_steps.draw_prompt(generator, 5) for _ in range(200)]
    assert len(set(drawn)) > 195
    assert all(len(calculator_steps.worked(prompt).split(",")) == 5 for prompt in drawn)
    assert set("".join(drawn)) == set("0123456789=") | set(calculator_steps.OPERATORS)


def test_only_all_steps_earn_one() -> None:
    assert calculator_steps.grade("7,8,3", "7,8,3") == 1.0
    for response in ("", "3", "7,8", "7,8,3,", "7,8,3,4", " 7,8,3", "7,8,4", "6,8,3", "7, 8,3"):
        assert calculator_steps.grade(response, "7,8,3") == 0.0, response


@pytest.mark.parametrize("answer", ["", "7,", "7,12", "7, 8", "x", "٣"])
def test_an_answer_that_no_chain_has_is_an_error(answer: str) -> None:
    with pytest.raises(ValueError, match="answer:"):
        calculator_steps.grade("7", answer)


def test_the_committed_prompts_are_those_that_the_command_writes(tmp_path: Path) -> None:
    prompt_set.prepare(tmp_path)
    for name in (prompt_set.TRAIN_FILE, prompt_set.HELDOUT_FILE):
        assert (tmp_path / name).read_bytes() == (tiny_model.DATA_FOLDER / name).read_bytes()
    train, heldout = (warm_start.read_pairs(path) for path in sorted(tmp_path.iterdir()))
    assert len(train) == len(heldout) == prompt_set.NUM_PROMPTS
    assert not set(train) & set(heldout)
    assert all(answer == calculator_steps.worked(prompt) for prompt, answer in train + heldout)


def test_the_warm_starts_pairs_are_right_and_of_the_training_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_set, "NUM_SYNTHETIC", 500)
    heldout = warm_start.read_pairs(tiny_model.DATA_FOLDER / prompt_set.HELDOUT_FILE)
    pairs = warm_start.TASKS["calculator_steps"].pairs(heldout)
    assert len({prompt for prompt, _ in pairs}) == 500
    assert not set(pairs) & set(heldout)
    assert all(answer == calculator_steps.worked(prompt) for prompt, answer in pairs)


def test_a_spoiled_step_is_gone_on_from() -> None:
    """A third of the readings do not follow from the one before; with share 0 all do, with share 1 none."""
    generator, pair = random.Random(0), ("3+4-2-1+5-3+2-4=", "7,5,4,9,6,8,4")
    for share in (0.0, 0.35, 1.0):
        wrong = 0
        for _ in range(200):
            prompt, said = prompt_set.spoiled(pair, share, generator)
            assert prompt == pair[0]
            reading, operations = calculator_steps.operations_of(prompt)
            for (operator, operand), following in zip(operations, map(int, said.split(",")), strict=True):
                assert 0 <= following <= calculator_steps.MAX_READING
                wrong += following != calculator_steps.step(reading, operator, operand)
                reading = following
        assert abs(wrong / 1400 - share) < 0.06


def test_a_task_has_settings_of_its_own() -> None:
    assert tuple(warm_start.TASKS) == tiny_model.TASKS
    first, steps, _ = warm_start.TASKS.values()
    assert (steps.settings.steps, steps.hidden_size, first.settings.steps, first.hidden_size) == (400, 64, 1400, 128)
