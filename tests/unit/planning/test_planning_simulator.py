"""The simulation of trainer and servers against schedules worked out by hand."""

import pytest

from minpro_megatron.planning.simulated_server import Lengths
from minpro_megatron.planning.simulator import Phases, Timeline
from tests.support.simulated_steps import PHASES, SlowedByContext, Steady, simulate


def test_without_delay_everything_happens_in_turn() -> None:
    found = simulate({"delay_steps": 0})
    assert found.step_s(0, 12) == pytest.approx(10 + 1 + 4 + 0.5)
    assert found.wait_share(0, 12) == pytest.approx(10 / 15.5)
    assert found.idle_share(0, 12) == pytest.approx(5.5 / 15.5)
    assert [span.phase for span in found.spans[:5]] == ["wait", "score", "train", "wait", "publish"]


@pytest.mark.parametrize("delay", [0, 1, 5])
def test_on_shared_gpus_the_servers_and_the_trainer_work_in_turns(delay: int) -> None:
    """Also with a delay; at the beginning the first version samples a batch more for each step of it."""
    phases = Phases(score=1, train=4, publish=0.5, pause=0.5, release=2)
    evaluated = {3: [Lengths(0, [30])]}
    found = simulate({"delay_steps": delay}, phases, in_turns=True, evaluations=evaluated)
    one = 10 + 2 + 1 + 4 + 0.5
    assert found.step_ends[0] == pytest.approx(10 + 2 + (delay + 1) * 1 + 4)  # the step is reported before it publishes
    assert found.step_s(1, 3) == pytest.approx(one)
    assert found.step_s(3, 4) == pytest.approx(one + 20)  # the evaluation of its version is done in the servers' turn
    assert found.phase_s("release", 4, 10) == pytest.approx(6 * 2)
    assert found.idle_share(4, 10) == pytest.approx(7.5 / one)
    order = ["wait", "release", "wait", "score", "train", "wait", "publish"]
    assert [span.phase for span in found.spans if span.step == 4] == order


@pytest.mark.parametrize("delay", [1, 2, 5])
def test_a_delay_overlaps_updates_with_generation(delay: int) -> None:
    """From publication to publication: 10 s of generation beside scoring (1 s) and updates (4 s), then 0.5 s."""
    found = simulate({"delay_steps": delay})
    first = delay + 1
    assert found.step_s(first, 12) == pytest.approx(10.5)
    assert found.wait_share(first, 12) == pytest.approx(5 / 10.5)
    assert found.idle_share(first, 12) == pytest.approx(0.5 / 10.5)


def test_a_version_is_not_replaced_before_its_evaluation_has_ended() -> None:
    found = simulate({"delay_steps": 1}, evaluations={3: [Lengths(0, [5]), Lengths(0, [30])]})
    (start, end) = found.evaluations[3]
    published = found.step_ends[2] - PHASES.score
    assert (start, end - start) == (pytest.approx(published), pytest.approx(30))
    assert found.step_s(3, 4) == pytest.approx(30 + 0.5)  # sampled beside updates and scoring, then sent
    assert found.step_s(4, 12) == pytest.approx(10.5)
    assert sorted(found.request_s)[-2:] == pytest.approx([10, 30])


def test_evaluation_groups_start_behind_training_groups() -> None:
    """Eight of ten requests run at once: after the training groups' 10 s, ten of the evaluation take two rounds."""
    evaluated = [Lengths(0, [10, 10])] * 5
    found = simulate({"delay_steps": 1}, server=Steady(max_running=8), evaluations={3: evaluated})
    start, end = found.evaluations[3]
    assert end - start == pytest.approx(30)
    assert found.batch_s == pytest.approx(simulate({"delay_steps": 1}, server=Steady(max_running=8)).batch_s)


def test_a_trainer_slower_than_the_servers_never_waits() -> None:
    found = simulate({"delay_steps": 2}, phases=Phases(1, 20, 0.5, 0.5))
    assert found.step_s(3, 12) == pytest.approx(21.5)
    assert found.wait_share(3, 12) == 0
    assert found.idle_share(3, 12) == pytest.approx(11.5 / 21.5)


@pytest.mark.parametrize(("train", "generation", "slower"), [(3.0, 10, "servers"), (30.0, 10, "trainer")])
def test_with_an_unlimited_bound_the_slower_side_is_never_idle(train: float, generation: int, slower: str) -> None:
    found = simulate(
        {"mode": "bounded", "max_staleness": 50},
        phases=Phases(1, train, 0, 0),
        server=Steady(max_running=8),
        lengths=lambda group: Lengths(0, [generation, generation]),
        steps=30,
    )
    if slower == "servers":
        assert found.idle_share(1, 30) == pytest.approx(0, abs=1e-9)
        assert found.step_s(20, 30) == pytest.approx(generation, rel=0.05)
    else:
        assert found.wait_share(1, 30) == pytest.approx(0, abs=1e-9)
        assert found.step_s(20, 30) == pytest.approx(train + 1)


def test_bounded_servers_stop_when_the_bound_is_reached() -> None:
    """Bound 1, a slow trainer: eight groups may exist at once, and then none may start before a step is consumed."""
    found = simulate({"mode": "bounded", "max_staleness": 1}, phases=Phases(0, 40, 0, 0))
    assert found.step_s(4, 12) == pytest.approx(40)
    assert found.idle_share(4, 12) == pytest.approx(30 / 40)


def test_slots_are_used_less_than_servers_have_work_while_the_longest_response_ends() -> None:
    """One response of 40 s and seven of 10 s on eight slots, in steps of 45.5 s."""
    lengths = {0: [40, 10], 1: [10, 10], 2: [10, 10], 3: [10, 10]}
    found = simulate(
        {"delay_steps": 0}, lengths=lambda group: Lengths(0, lengths[group % 4]), server=Steady(max_running=8)
    )
    assert found.idle_share(2, 12) == pytest.approx(5.5 / 45.5)
    assert found.slot_share(2, 12) == pytest.approx((40 + 7 * 10) / (8 * 45.5))


def test_a_batch_ends_with_its_longest_response() -> None:
    lengths = {0: [3, 5], 1: [40, 1], 2: [7, 7], 3: [2, 2]}
    found = simulate({"delay_steps": 0}, lengths=lambda group: Lengths(0, lengths[group % 4]))
    assert found.batch_s == [pytest.approx(40)] * 12
    assert found.idle_share(0, 12) == pytest.approx(5.5 / 45.5)


def test_groups_wait_for_the_first_server_with_room() -> None:
    """Two servers of one group at a time: one has a group of 30 s, the other those of 10, 10 and 10 s."""
    lengths = [30, 10, 10, 10]
    found = simulate(
        {"delay_steps": 0},
        server=Steady(num_servers=2, max_running=2),
        lengths=lambda group: Lengths(0, [lengths[group % 4]] * 2),
        steps=1,
    )
    assert found.batch_s == [pytest.approx(30)]
    assert [sum(end - start for start, end in server) for server in found.busy] == [pytest.approx(30)] * 2


def test_responses_that_end_leave_the_cache() -> None:
    """Prompt of 100 tokens, two responses: with the one that has ended, half of what is read goes."""
    found = simulate(
        {"delay_steps": 0},
        server=SlowedByContext(),
        lengths=lambda group: Lengths(100, [1, 2]),
        prompts=1,
        steps=1,
    )
    assert found.batch_s == [pytest.approx(200 + (200 + 2) / 2)]


def test_no_more_start_than_the_cache_has_room_for() -> None:
    """Prompts of 50 tokens in a cache of 120: the third response starts when the first two have ended at 60 each."""
    prompts = {"lengths": lambda group: Lengths(50, [10, 10]), "prompts": 2, "steps": 1}
    roomy, full = (simulate({"delay_steps": 0}, server=Steady(kv_tokens=room), **prompts) for room in (1000, 120))
    assert roomy.batch_s == [pytest.approx(10)]
    assert full.batch_s == [pytest.approx(20)]
    smallest = simulate({"delay_steps": 0}, server=Steady(kv_tokens=1), **prompts)  # one response always runs
    assert smallest.batch_s == [pytest.approx(4 * 10)]


def test_no_more_run_at_once_than_a_server_takes() -> None:
    found = simulate({"delay_steps": 0}, server=Steady(max_running=1))
    assert found.batch_s[0] == pytest.approx(4 * 2 * 10)


def test_prompts_are_computed_once_a_group_before_its_responses() -> None:
    found = simulate({"delay_steps": 0}, server=Steady(prefill=0.1), lengths=lambda group: Lengths(20, [10, 10]))
    assert found.batch_s[0] == pytest.approx(4 * 20 * 0.1 + 10)


@pytest.mark.parametrize(("pause_mode", "again"), [("retract", True), ("in_place", False)])
def test_retracted_responses_are_computed_again_after_a_publication(pause_mode: str, again: bool) -> None:
    def with_prefill(seconds: float) -> Timeline:
        return simulate(
            {"mode": "bounded", "max_staleness": 3},
            server=Steady(prefill=seconds, max_running=8),
            lengths=lambda group: Lengths(1, [10, 10]),
            publish={"pause_mode": pause_mode},
        )

    found, free = with_prefill(0.05), with_prefill(0)
    lost = found.step_s(4, 12) - free.step_s(4, 12)
    assert lost == pytest.approx(4 * 0.05, abs=0.02) if not again else lost > 0.5


def test_checkpoints_take_their_turn() -> None:
    found = simulate({"delay_steps": 0}, phases=Phases(1, 4, 0.5, 0.5, checkpoint=3, checkpoint_every=4), steps=12)
    saved = [span for span in found.spans if span.phase == "checkpoint" and span.end > span.start]
    assert [span.step for span in saved] == [3, 7, 11]
    assert all(span.end - span.start == pytest.approx(3) for span in saved)


def test_spans_follow_one_another_and_cover_the_run() -> None:
    found = simulate({"mode": "bounded", "max_staleness": 2})
    ends = [span.end for span in found.spans]
    assert [span.start for span in found.spans] == [0.0, *ends[:-1]]
    for server in found.busy:
        flat = [time for interval in server for time in interval]
        assert flat == sorted(flat)


@pytest.mark.parametrize("pause", [0.0, 2.0])
def test_servers_stand_still_only_while_weights_arrive(pause: float) -> None:
    """Ten seconds of sampling a step, for a much faster trainer: servers set the pace, and lose their pauses."""
    found = simulate(
        {"mode": "bounded", "max_staleness": 4},
        phases=Phases(0, 1, 2, pause),
        server=Steady(max_running=8),
        publish={"pause_mode": "in_place"},
        steps=16,
    )
    assert found.step_s(6, 16) == pytest.approx(10 + pause, rel=0.03)
    assert found.idle_share(6, 16) == pytest.approx(0, abs=1e-9)
