"""The metrics of a step with several publications: none of them hides what another met."""

import asyncio
from typing import Any

import pytest

from minpro_megatron.collector.leases import Leases
from minpro_megatron.metrics.declared import check_declared
from minpro_megatron.publishing.canary import Difference
from minpro_megatron.publishing.publish_report import PublishReport, publication_metrics
from tests.support.rollout_fakes import FakeServers, no_evaluations


def report(held_by: list[int], failed: list[int], **changes: Any) -> PublishReport:
    fields = {
        "version": 3,
        "held_by": held_by,
        "failures": {index: f"server {index}: no" for index in failed},
        "transport": "broadcast",
        "total_s": 3.0,
        "paused_s": 0.5,
        "transfer_s": 2.0,
        "num_bytes": 100,
        "checksum": "5e",
        "canaries": {index: Difference(mean=0.1, max=0.2 / (1 + index)) for index in held_by},
    }
    return PublishReport(**fields | changes)


def test_one_publication() -> None:
    found = publication_metrics([report([0, 1], [2])])
    check_declared(found)
    assert found == {
        "publish/paused_s": 0.5,
        "publish/bytes_per_s": 50.0,
        "publish/servers": 2.0,
        "publish/failures": 1.0,
        "publish/fallbacks": 0.0,
        "publish/canary_abs_mean": pytest.approx(0.1),
        "publish/canary_server_max": pytest.approx(0.1),
        "publish/canary_abs_max": 0.2,
    }


def test_a_second_publication_of_a_step_hides_nothing_of_the_first() -> None:
    canaries = {0: Difference(mean=0.5, max=0.1), 1: Difference(mean=0.3, max=0.9), 2: Difference(mean=0.1, max=0.3)}
    first = report([0], [1, 2], paused_s=4.0, transfer_s=8.0, num_bytes=900, canaries=canaries)
    found = publication_metrics([first, report([0, 1, 2], [], fell_back=True)])
    assert found == {
        "publish/paused_s": 4.0,
        "publish/bytes_per_s": 100.0,  # of both together
        "publish/servers": 3.0,  # those that have work now
        "publish/failures": 2.0,
        "publish/fallbacks": 1.0,
        "publish/canary_abs_mean": pytest.approx((0.5 + 0.3 + 0.1 + 3 * 0.1) / 6),
        "publish/canary_server_max": 0.5,
        "publish/canary_abs_max": 0.9,
    }


def test_nobody_left_and_nothing_published() -> None:
    nobody = report([], [0], transport=None, transfer_s=0.0, num_bytes=0, canaries={})
    assert publication_metrics([nobody]) == {
        "publish/paused_s": 0.5,
        "publish/servers": 0.0,
        "publish/failures": 1.0,
        "publish/fallbacks": 0.0,
    }
    assert publication_metrics([]) == {}


def test_the_servers_idle_share_is_that_of_the_whole_step() -> None:
    """Also where servers that had come back got the version before in between."""

    class Servers(FakeServers):
        idle_s = 0.0

        def metrics(self) -> dict[str, float]:
            return {"fleet/members": 2.0, "fleet/idle_s": self.idle_s}

    async def main() -> None:
        now, servers = 100.0, Servers(2)
        leases = Leases(servers, [[1]], no_evaluations())
        asyncio.get_running_loop().time = lambda: now  # type: ignore[method-assign]

        def granted(version: int) -> float | None:
            leases.grant(version, False)
            return ended(version)

        def ended(version: int) -> float | None:
            assert leases.current is not None
            share = leases.current.metrics.get("overlap/server_idle_share")
            leases.end([0, 1], first_time=leases.current.version == version)
            return share

        assert granted(1) is None
        now, servers.idle_s = 110.0, 15.0
        servers.restart(1)
        assert leases.grant_again(1, False)
        assert ended(0) == 0.75
        now, servers.idle_s = 130.0, 18.0
        assert granted(2) == 0.3
        now, servers.idle_s = 140.0, 18.0
        assert granted(3) == 0.0

    asyncio.run(main())
