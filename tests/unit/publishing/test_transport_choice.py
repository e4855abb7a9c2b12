"""The transport of a publication follows from the publications before it."""

import pytest

from minpro_megatron.publishing.sender import Transport
from minpro_megatron.publishing.transport_choice import Tried, first_transport

SENT, LOST, BY_DISK = Tried("broadcast", True), Tried("broadcast", False), Tried("disk", True)


@pytest.mark.parametrize(
    ("past", "expected"),
    [
        ([], "broadcast"),
        ([SENT, SENT], "broadcast"),
        # it has never worked: the whole fleet would be restarted again
        ([LOST], "disk"),
        ([LOST, BY_DISK, BY_DISK], "disk"),
        # it has worked: after the disk it is tried once more
        ([SENT, LOST], "disk"),
        ([SENT, LOST, Tried("disk", False)], "broadcast"),
        ([SENT, LOST, BY_DISK], "broadcast"),
        ([SENT, LOST, BY_DISK, LOST], "disk"),
        ([SENT, LOST, BY_DISK, LOST, BY_DISK, BY_DISK], "disk"),
        # a second fault, days after the first
        ([SENT, LOST, BY_DISK, SENT, SENT, LOST, BY_DISK], "broadcast"),
    ],
)
def test_a_transport_that_left_no_server_is_not_repeated(past: list[Tried], expected: Transport) -> None:
    assert first_transport("broadcast", past) == expected


def test_the_disk_has_no_other() -> None:
    assert first_transport("disk", [Tried("disk", False)]) == "disk"
    assert first_transport("disk", [Tried("disk", True), Tried("disk", False)]) == "disk"
