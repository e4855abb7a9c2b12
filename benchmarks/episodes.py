"""What tools cost: tokens/s of a server whose episodes wait for a slow tool, and the collector's work for each turn.

    python -m benchmarks.episodes [--groups 400] [--tool-s 2] [--share 0.1]

The servers are simulated: each response runs at a fixed rate while the server has room for it. Time is simulated too
(the event loop's clock jumps to the next event), so the first table depends on no machine. The code between them is the
run's own: fleet, dispatch, episodes. The second table is processor time.
"""

import argparse
import asyncio
import random
import selectors
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from minpro_megatron.config.run import RunConfig
from minpro_megatron.environments.environment import Answer, EpisodeTurn
from minpro_megatron.environments.framing import Framing
from minpro_megatron.fleet.episodes import EpisodeRules
from minpro_megatron.fleet.fleet import Fleet
from minpro_megatron.fleet.generation import GroupCollector
from minpro_megatron.fleet.held_server import HeldServer
from minpro_megatron.models.model_files import ModelFacts
from minpro_megatron.records import IssuedGroup, Prompt, ServerAddress
from minpro_megatron.rewards.graders import SampledText
from minpro_megatron.rewards.judging import Judged
from minpro_megatron.serving.answers import SampledSequence
from minpro_megatron.serving.client import SamplingParameters
from minpro_megatron.serving.endpoints import write_server_address

GROUP_SIZE, IN_FLIGHT, TOKENS_PER_S = 8, 64, 50.0
MEDIAN_TURN_TOKENS, SIGMA, MAX_TOKENS = 400, 0.8, 8000
FACTS = ModelFacts(vocabulary_size=1000, stop_token_ids=(1,), max_position_embeddings=40960)
STOP = 1


class SimulatedTime(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next event when nothing is left to do."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(selectors.SelectSelector())
        select = self._selector.select  # type: ignore[attr-defined]

        def jump(timeout: float | None = None) -> list[Any]:
            found = select(0)
            if not found and timeout:
                self._now += timeout
            return found

        self._selector.select = jump  # type: ignore[attr-defined]

    def time(self) -> float:
        return self._now


class SimulatedServer:
    """Its client: a turn of log-normal length, which ends after its tokens / TOKENS_PER_S seconds, or at once."""

    def __init__(self, takes_time: bool) -> None:
        self.name, self.num_tokens, self._takes_time = "simulated server", 0, takes_time
        self._made: dict[int, SampledSequence] = {}

    async def __aenter__(self) -> "SimulatedServer":
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def policy_version(self, timeout_s: float) -> int:
        return 0

    async def generates(self, timeout_s: float) -> bool:
        return True

    async def generate(
        self,
        prompt_token_ids: np.ndarray,
        seeds: Sequence[int],
        sampling: SamplingParameters,
        policy_version: int,
        before_continuing: Callable[[], Awaitable[object]],
    ) -> list[SampledSequence]:
        found = [self._sequence(seed, sampling.max_response_tokens) for seed in seeds]
        longest = max(len(one.token_ids) for one in found)
        await asyncio.sleep(longest / TOKENS_PER_S if self._takes_time else 0)
        self.num_tokens += sum(len(one.token_ids) for one in found)
        return found

    def _sequence(self, seed: int, limit: int) -> SampledSequence:
        length = min(limit, max(2, int(MEDIAN_TURN_TOKENS * np.exp(SIGMA * random.Random(seed).gauss()))))
        if length not in self._made:
            ids = np.full(length, 5, np.int32)
            ids[-1] = STOP
            versions = np.zeros(length, np.int32)
            self._made[length] = SampledSequence(ids, np.full(length, -0.5, np.float32), versions, "stop")
        return self._made[length]


@dataclass
class SlowTool:
    """Answers a share of the turns, after a time; the other turns end their episode."""

    share: float
    seconds: float

    async def answer(self, turn: EpisodeTurn) -> Answer | None:
        if random.Random(turn.seed + len(turn.earlier)).random() >= self.share:
            return None
        await asyncio.sleep(self.seconds)
        return Answer("42", tool_calls=1)


class Words:
    """A tokenizer and a template without text."""

    def response_texts(self, responses: Sequence[np.ndarray]) -> list[str]:
        return [""] * len(responses)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.asarray([STOP, 7, 8], np.int32) for _ in texts]

    encode_given = encode_all

    def around_answer(self, role: str) -> tuple[str, str]:
        return "", ""


class NoRewards:
    async def judge(
        self, prompt: Prompt, responses: Sequence[SampledText], stop_at_failure: bool = False
    ) -> list[Judged]:
        return [Judged(0.0) for _ in responses]


def settings(root: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "episodes",
            "runs_dir": str(root),
            "device": "cpu",
            "model": {"hf_path": "unused", "megatron_path": "unused", "dtype": "float32"},
            "data": {"train_file": "unused", "heldout_file": "unused"},
            "batch": {"num_prompts": 32, "responses_per_prompt": GROUP_SIZE, "mini_batch_prompts": 32},
            "server": {"device": "cpu", "dtype": "float32", "max_running_requests": round(IN_FLIGHT / 1.25)},
        }
    )


def group(number: int) -> IssuedGroup:
    return IssuedGroup(
        group_id=number,
        batch_index=0,
        policy_version=0,
        prompt=Prompt(id=str(number), source="", text="", answer=""),
        prompt_token_ids=np.arange(10, 210, dtype=np.int32),
        sampling_seeds=[GROUP_SIZE * number + place for place in range(GROUP_SIZE)],
    )


def episode_rules(tool: SlowTool) -> EpisodeRules:
    words: Any = Words()
    return EpisodeRules(
        tool, Framing.of(words, words, FACTS.stop_token_ids, "tool", 100), words, FACTS.vocabulary_size, 5, None
    )


async def sample(root: Path, count: int, tool: SlowTool | None, server: SimulatedServer) -> None:
    """`count` groups through fleet and dispatcher, all waiting from the start, as in a step of delay mode."""
    config = settings(root)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    write_server_address(config.run_dir, ServerAddress(index=0, url="http://unused", tensor_parallel=1), 0)
    words: Any = Words()
    rewards: Any = NoRewards()
    async with Fleet(config, FACTS, 0, lambda address: server, watch_interval_s=1.0) as fleet:
        await fleet.wait_until_ready(60)
        collector = GroupCollector(fleet, rewards, words, episode_rules(tool) if tool else None)
        sampling = SamplingParameters(1.0, MAX_TOKENS)
        await asyncio.gather(*(collector.collect(group(number), sampling) for number in range(count)))


def tokens_per_s(count: int, tool: SlowTool) -> float:
    """Sampled tokens per simulated second."""
    server = SimulatedServer(takes_time=True)

    async def inline[Result](function: Callable[..., Result], *arguments: Any) -> Result:
        return function(*arguments)  # real threads know nothing of simulated time

    threads, asyncio.to_thread = asyncio.to_thread, inline  # type: ignore[assignment]
    try:
        with tempfile.TemporaryDirectory() as root, asyncio.Runner(loop_factory=SimulatedTime) as runner:
            began = runner.get_loop().time()
            runner.run(sample(Path(root), count, tool, server))
            return server.num_tokens / (runner.get_loop().time() - began)
    finally:
        asyncio.to_thread = threads  # type: ignore[assignment]


def processor_s(count: int, tool: SlowTool | None) -> float:
    """Processor time of the collector for each response, without the simulated time of servers and tools."""
    server = SimulatedServer(takes_time=False)
    with tempfile.TemporaryDirectory() as root:
        began = time.process_time()
        asyncio.run(sample(Path(root), count, tool, server))
        return (time.process_time() - began) / (count * GROUP_SIZE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=400)
    parser.add_argument("--tool-s", type=float, default=2.0)
    parser.add_argument("--share", type=float, default=0.1)
    arguments = parser.parse_args()
    count, share, seconds = arguments.groups, arguments.share, arguments.tool_s
    table = Table(
        box=MARKDOWN, title=f"{IN_FLIGHT} episodes in flight, a tool of {seconds:g} s on {share:.0%} of turns"
    )
    for name in ("", "tokens/s", "cost"):
        table.add_column(name, justify="left" if not name else "right")
    instant = tokens_per_s(count, SlowTool(share, 0.0))
    rows = {"a tool that answers at once": instant, "the slow tool": tokens_per_s(count, SlowTool(share, seconds))}
    idle = HeldServer.idle

    async def keep_the_place(self: HeldServer, waiting: Awaitable[Any]) -> Any:
        return await waiting

    HeldServer.idle = keep_the_place  # type: ignore[method-assign]
    rows["the slow tool, places kept until a group is over"] = tokens_per_s(count, SlowTool(share, seconds))
    HeldServer.idle = idle  # type: ignore[method-assign]
    for name, rate in rows.items():
        table.add_row(name, f"{rate:.0f}", f"{1 - rate / instant:.1%}")
    cpu = Table(box=MARKDOWN, title="processor time of the collector for each response")
    for name in ("", "ms"):
        cpu.add_column(name, justify="left" if not name else "right")
    processor_s(count, None)  # imports and caches
    for name, tool in (
        ("one request for a group, no environment", None),
        ("an environment that ends every episode after its first turn", SlowTool(0.0, 0.0)),
    ):
        cpu.add_row(name, f"{1e3 * min(processor_s(count, tool) for _ in range(3)):.2f}")
    Console().print(table, cpu, sep="\n")


if __name__ == "__main__":
    main()
