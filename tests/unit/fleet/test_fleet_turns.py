"""The fleet tells serve whose turn it is, and waits until that holds for every server."""

import asyncio
from pathlib import Path

from minpro_megatron.fleet.turns import Turns
from minpro_megatron.records import ServerAddress
from minpro_megatron.serving.turn_files import Turn, confirm_turn, read_turn


def test_the_memory_is_the_trainers_once_every_server_has_confirmed(tmp_path: Path) -> None:
    servers = [ServerAddress(index=index, url="http://s:1", tensor_parallel=1, start=index) for index in range(2)]
    (tmp_path / "endpoints").mkdir()

    async def main() -> None:
        turns = Turns(tmp_path, 3, num_servers=2, poll_s=0.001)
        assert read_turn(tmp_path, 3) == Turn(number=0, released=None)
        waiting = asyncio.create_task(turns.keep_only(servers[1:]))
        while (found := read_turn(tmp_path, 3)).number == 0:
            await asyncio.sleep(0.001)
        assert found == Turn(number=1, released=[(1, 1)])
        assert [found.allows(0, 0), found.allows(1, 1), found.allows(1, 2)] == [False, True, False]
        confirm_turn(tmp_path, 1, 1, 3)
        confirm_turn(tmp_path, 0, 1, 2)  # of an earlier start of the run
        await asyncio.sleep(0.02)
        assert not waiting.done()
        confirm_turn(tmp_path, 0, 1, 3)
        await waiting
        await turns.let_start()
        assert read_turn(tmp_path, 3) == Turn(number=2, released=None)
        ending = asyncio.create_task(turns.keep_only([], is_last=True))
        while (found := read_turn(tmp_path, 3)).number == 2:
            await asyncio.sleep(0.001)
        assert found == Turn(number=3, released=[], is_last=True)
        ending.cancel()

    asyncio.run(main())
