"""The files by which the nodes of one start find each other."""

import threading
from pathlib import Path

from minpro_megatron.launch.preflight.problems import Problem
from minpro_megatron.launch.starts import Plan, Report, Start, Verdict, begin_start, find_start, wait_for


def test_every_start_has_its_number(tmp_path: Path) -> None:
    assert [begin_start(tmp_path).incarnation for _ in range(3)] == [0, 1, 2]
    (tmp_path / "starts" / "11").mkdir()
    (tmp_path / "starts" / "notes").mkdir()
    assert begin_start(tmp_path).incarnation == 12


def test_starts_at_the_same_time_get_different_numbers(tmp_path: Path) -> None:
    found: list[int] = []
    gate = threading.Barrier(8)

    def begin() -> None:
        gate.wait()
        found.append(begin_start(tmp_path).incarnation)

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(8))


def test_a_node_finds_the_start_of_its_own_key_only(tmp_path: Path) -> None:
    assert find_start(tmp_path, "job-1") is None
    for number in range(11):  # numbers, not names, are in order
        begin_start(tmp_path).write_plan(Plan(key=f"job-{number}", address=f"10.0.0.{number}"))
    begin_start(tmp_path)  # one without a plan yet
    for number in (1, 10):
        found = find_start(tmp_path, f"job-{number}")
        assert found is not None
        start, plan = found
        assert (start.incarnation, plan.address) == (number, f"10.0.0.{number}")
    assert find_start(tmp_path, "job-11") is None


def test_nodes_read_what_the_others_wrote(tmp_path: Path) -> None:
    start = begin_start(tmp_path)
    other = Start(tmp_path / "starts" / "0")
    assert (other.reports(2), other.read_verdict(), other.failed(2)) == ([], None, {})
    reports = [
        Report(node=1, host="b", clock_s=0.5, problems=[Problem("bad", is_transient=True)]),
        Report(node=0, host="a"),
    ]
    for report in reports:
        start.write_report(report)
    start.write_verdict(Verdict(problems=[Problem("no")]))
    assert other.reports(3) == reports[::-1]
    assert other.read_verdict() == Verdict(problems=[Problem("no")])
    start.write_done(1, "b")
    assert other.are_done([1])
    assert not other.are_done([0, 1])
    start.write_failed(0, "a", "it broke")
    assert {node: (end.host, end.why) for node, end in other.failed(2).items()} == {0: ("a", "it broke")}


def test_a_clock_is_compared_with_the_file_systems(tmp_path: Path) -> None:
    start = begin_start(tmp_path)
    assert abs(start.clock_ahead_s(0)) < 1
    assert list((tmp_path / "starts" / "0").iterdir()) == []


def test_waiting_ends(tmp_path: Path) -> None:
    answers = iter([None, None, 3])
    assert wait_for(lambda: next(answers), 5, poll_s=0.001) == 3
    assert wait_for(lambda: None, 0.01, poll_s=0.001) is None
