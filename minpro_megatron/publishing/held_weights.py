"""What servers hold, as they report it."""

from collections.abc import Iterable
from typing import NamedTuple

from minpro_megatron.serving.calls import start_for_all
from minpro_megatron.serving.control import ServerControl


class HeldWeights(NamedTuple):
    """The oldest version that a server reports, and the checksums of the servers with that version, by tensor-parallel
    size: different shards have different checksums."""

    version: int
    checksums: dict[int, str]


def held_weights(controls: Iterable[ServerControl]) -> HeldWeights | None:
    """None if no server reports a version."""
    by_index = {control.address.index: control for control in controls}
    versions = start_for_all(by_index.values(), "policy_version").results()
    if not versions:
        return None
    oldest = min(versions.values())
    asked = [by_index[index] for index, version in versions.items() if version == oldest]
    found = start_for_all(asked, "weights_checksum").results()
    by_size = {by_index[index].address.tensor_parallel: checksum.engine for index, checksum in found.items()}
    return HeldWeights(oldest, by_size)
