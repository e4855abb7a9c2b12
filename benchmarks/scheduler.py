"""Processor time of the collector's decisions: which server gets a group, and which groups a step consumes.

The dispatcher and the schedules of a run, without servers: every group gets a server, keeps it while the servers are
full, and gives it back, as in the middle of a step. Bounded mode is asked for its batch after every group, as the
collector does.
"""

import argparse
import asyncio
import random
import time
from collections import deque

from minpro_megatron.buffer.schedule import make_schedule
from minpro_megatron.config.run import RunConfig, parse_run_config
from minpro_megatron.fleet.dispatch import Dispatcher, Ticket
from minpro_megatron.fleet.member import Member
from minpro_megatron.records import ServerAddress
from tests.support.fake_client import FakeClient

GROUPS_OF_A_SERVER = 32
RESPONSES = 8


def dispatch_s(num_servers: int, num_groups: int) -> float:
    """Seconds of processor time for `num_groups` groups on servers that are full all the time."""
    members = [
        Member(ServerAddress(index=index, url="http://x", tensor_parallel=1), FakeClient(f"server {index}"))
        for index in range(num_servers)
    ]
    known = {member.key: member for member in members}
    dispatcher = Dispatcher(
        lambda: sorted(known.values(), key=lambda member: member.key),
        lambda member: known.get(member.key) is member,
        GROUPS_OF_A_SERVER * RESPONSES,
        slow_factor=3,
    )
    dispatcher.dispatch()

    async def work() -> float:
        held: deque[Member] = deque()
        started = time.process_time()
        for number in range(num_groups):
            if len(held) == num_servers * GROUPS_OF_A_SERVER:
                dispatcher.release(held.popleft(), RESPONSES)
            held.append(await dispatcher.acquire(Ticket(False, number), RESPONSES, ()))
        while held:
            dispatcher.release(held.popleft(), RESPONSES)
        return time.process_time() - started

    return asyncio.run(work())


def schedule_s(mode: str, num_prompts: int, num_steps: int) -> float:
    """Seconds of processor time per step of so many groups, which end in any order."""
    config = _config(mode, num_prompts, num_steps)
    made, rng = make_schedule(config), random.Random(0)
    ahead = config.staleness.delay_steps if mode == "delay" else 0
    started = time.process_time()
    in_flight: list[int] = []
    for step in range(num_steps):
        while made.batch(step) is None or not made.may_publish():
            in_flight += [slot.group_id for slot in made.to_issue()]
            place = rng.randrange(len(in_flight))
            in_flight[place], in_flight[-1] = in_flight[-1], in_flight[place]
            made.collected(in_flight.pop(), accepted=True)
        made.consumed(step)
        if step + ahead < num_steps:
            made.published()
    return (time.process_time() - started) / num_steps


def _config(mode: str, num_prompts: int, num_steps: int) -> RunConfig:
    return parse_run_config(
        {
            "name": "scheduler",
            "num_global_steps": num_steps,
            "model": {"hf_path": "unused", "megatron_path": "unused"},
            "data": {"train_file": "unused", "heldout_file": "unused"},
            "batch": {"num_prompts": num_prompts, "mini_batch_prompts": num_prompts},
            "staleness": {"mode": mode, "delay_steps": 2, "max_staleness": 2},
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", type=int, nargs="+", default=[16, 128, 512])
    parser.add_argument("--groups", type=int, nargs="+", default=[512, 2_048, 8_192, 16_384])
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    print(f"| groups | {' | '.join(f'{count} servers, us a group' for count in arguments.servers)} |")
    print("|---|" + "---|" * len(arguments.servers))
    for groups in arguments.groups:
        cells = [f"{1e6 * dispatch_s(servers, groups) / groups:.0f}" for servers in arguments.servers]
        print(f"| {groups} | {' | '.join(cells)} |", flush=True)
    print("\n| groups of a step | delay 2, s a step | bounded 2, s a step |\n|---|---|---|")
    for groups in arguments.groups:
        cells = [f"{schedule_s(mode, groups, arguments.steps):.3f}" for mode in ("delay", "bounded")]
        print(f"| {groups} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
