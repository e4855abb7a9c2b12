"""The collector's stages alone, in turn, and a plain file append for comparison with the journal's writes."""

import asyncio
import os
import shutil
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from benchmarks.synthetic_servers import response_lengths, synthetic_servers
from minpro_megatron import records
from minpro_megatron.buffer.journal import Journal
from minpro_megatron.buffer.journal_file import PAGE_BYTES
from minpro_megatron.config.run import RunConfig
from minpro_megatron.models.model_files import ModelFacts, read_model_facts
from minpro_megatron.prompts.tokenizer import TextTokenizer
from minpro_megatron.records import Batch, CollectedGroup, IssuedGroup, Prompt, Response, ServerAddress
from minpro_megatron.serving.answers import AnswerChecker, SampledSequence, SentRequest
from minpro_megatron.serving.client import SamplingParameters, ServerClient, _Response

# SQLite's wal_autocheckpoint is 1000 pages; the plain append also syncs after this number of bytes.
SYNC_EVERY_BYTES = 1000 * PAGE_BYTES
PROMPT = list(range(100, 164))

Answer = tuple[bytes, list[SentRequest]]


class Stages:
    """Runs each stage over the same groups, and records wall time and CPU time of this process."""

    def __init__(self, config: RunConfig, facts: ModelFacts, folder: Path, num_groups: int) -> None:
        self._config, self._facts, self._folder = config, facts, folder
        self._checker = AnswerChecker("a synthetic server", facts, exact_versions=True)
        self._tokenizer = TextTokenizer(config.model.hf_path, facts)
        size = config.batch.responses_per_prompt
        self._seeds = [[group * size + place for place in range(size)] for group in range(num_groups)]
        self.times: dict[str, list[tuple[float, float]]] = {}
        self.num_bytes: dict[str, int] = {}

    def timed(self, name: str, work: Callable[[], Any], num_bytes: int) -> Any:
        start, cpu = time.perf_counter(), time.process_time()
        found = work()
        self.times.setdefault(name, []).append((time.perf_counter() - start, time.process_time() - cpu))
        self.num_bytes[name] = num_bytes
        return found

    async def awaited(self, name: str, work: Awaitable[Any], num_bytes: int) -> Any:
        start, cpu = time.perf_counter(), time.process_time()
        found = await work
        self.times.setdefault(name, []).append((time.perf_counter() - start, time.process_time() - cpu))
        self.num_bytes[name] = num_bytes
        return found

    async def round(self, client: ServerClient, place: int) -> None:
        """Every stage once."""
        answers: list[Answer] = await self._receive(client)
        json_bytes = sum(len(body) for body, _ in answers)
        sampled = self.timed("parse and check, 1 thread", partial(self._check_all, answers, 1), json_bytes)
        self.timed("parse and check, 2 threads", partial(self._check_all, answers, 2), json_bytes)
        del answers
        texts = self.timed(
            "text for the reward",
            lambda: [
                text
                for group in sampled
                for text in self._tokenizer.response_texts([sequence.token_ids for sequence in group])
            ],
            0,
        )
        self.num_bytes["text for the reward"] = sum(len(text) for text in texts)
        await self._journal_round([_collected(number, group) for number, group in enumerate(sampled)], place)

    def _check_all(self, answers: Sequence[Answer], num_threads: int) -> list[list[SampledSequence]]:
        with ThreadPoolExecutor(num_threads) as threads:
            return list(threads.map(lambda answer: self._checker.check(*answer), answers))

    async def _receive(self, client: ServerClient) -> list[Answer]:
        """Sends requests and receives bodies as the client does, four at a time, without decoding the answers."""
        limit = asyncio.Semaphore(4)
        sampling = SamplingParameters(1.0, self._config.sampling.max_response_tokens)
        session = client._session
        assert session is not None

        async def ask(seeds: Sequence[int]) -> Answer:
            responses = [_Response(PROMPT, seed, sampling.max_response_tokens, 0) for seed in seeds]
            sent = [response.request(f"{seed:032x}", sampling) for response, seed in zip(responses, seeds, strict=True)]
            data = client._encoded(responses, sent, sampling)
            async with limit, session.post(f"{client.address.url}/generate", data=data) as response:
                return await client._body(response, sent), sent

        answers = await self.awaited("HTTP receive", asyncio.gather(*(ask(seeds) for seeds in self._seeds)), 0)
        self.num_bytes["HTTP receive"] = sum(len(body) for body, _ in answers)
        return answers

    async def _journal_round(self, groups: list[CollectedGroup], place: int) -> None:
        """In every second round the plain append comes first, because the disk is shared."""
        if place % 2:
            self._append(groups)
        await self._write_journal(groups)
        if not place % 2:
            self._append(groups)

    async def _write_journal(self, groups: list[CollectedGroup]) -> None:
        run_dir = self._folder / "journal"
        journal = await Journal.open(run_dir)
        await journal.issue([group.issued for group in groups])
        num_tokens = sum(len(response.token_ids) for group in groups for response in group.responses)

        async def collect() -> None:
            for group in groups:
                await journal.collect(group, accepted=True)

        batch = Batch(index=0, groups=groups)
        scores = [[response.rollout_log_probs for response in group.responses] for group in groups]
        await self.awaited("journal: collected", collect(), 8 * num_tokens)
        await self.awaited("journal: scored", journal.score(0, list(zip(groups, scores, strict=True))), 4 * num_tokens)
        await self.awaited(
            "journal: consumed, with the policy's",
            journal.consume(batch, [0] * len(groups), (), scores),
            4 * num_tokens,
        )
        await self.awaited("journal: flush", journal.flush(), 16 * num_tokens)
        await journal.close()
        shutil.rmtree(run_dir)
        body = self.timed("batch encode", lambda: records.encode(batch), 12 * num_tokens)
        self.timed("batch decode", lambda: records.decode(Batch, body), 12 * num_tokens)

    def _append(self, groups: list[CollectedGroup]) -> None:
        parts = [
            b"".join(part for r in group.responses for part in (r.token_ids.tobytes(), r.rollout_log_probs.tobytes()))
            for group in groups
        ]
        num_bytes = sum(map(len, parts))
        self.timed("plain append", lambda: self._append_all(parts, None), num_bytes)
        self.timed("plain append, synced as often", lambda: self._append_all(parts, SYNC_EVERY_BYTES), num_bytes)

    def _append_all(self, parts: Sequence[bytes], sync_every: int | None) -> None:
        path = self._folder / "appended"
        unsynced = 0
        with path.open("wb", buffering=0) as file:
            for part in parts:
                file.write(part)
                unsynced += len(part)
                if sync_every is not None and unsynced >= sync_every:
                    os.fdatasync(file.fileno())
                    unsynced = 0
        path.unlink()


def _collected(number: int, sampled: Sequence[SampledSequence]) -> CollectedGroup:
    prompt = Prompt(id=f"p{number}", source="none", text="", answer="")
    issued = IssuedGroup(
        group_id=number,
        batch_index=0,
        policy_version=0,
        prompt=prompt,
        prompt_token_ids=np.asarray(PROMPT, dtype=np.int32),
        sampling_seeds=list(range(len(sampled))),
    )
    responses = [
        Response(
            token_ids=sequence.token_ids,
            rollout_log_probs=sequence.log_probs,
            policy_versions=sequence.policy_versions,
            finish_reason=sequence.finish_reason,
            reward=0.0,
        )
        for sequence in sampled
    ]
    return CollectedGroup(issued=issued, responses=responses)


async def _measure(config: RunConfig, server: ServerAddress, folder: Path, num_groups: int, repeats: int) -> Stages:
    facts = read_model_facts(config.model.hf_path)
    stages = Stages(config, facts, folder, num_groups)
    async with ServerClient(server, facts, 600.0) as client:
        for place in range(repeats):
            await stages.round(client, place)
    return stages


def measure_stages(config: RunConfig, num_groups: int, repeats: int, console: Console) -> dict[str, Any]:
    """Wall seconds and CPU seconds of each stage, for every repeat; prints the medians."""
    folder = Path(config.runs_dir) / "stages"
    folder.mkdir(parents=True)
    max_tokens = config.sampling.max_response_tokens
    with synthetic_servers(folder, 1, 1, max_tokens) as (server,):
        stages = asyncio.run(_measure(config, server, folder, num_groups, repeats))
    lengths, size = response_lengths(max_tokens), config.batch.responses_per_prompt
    num_tokens = sum(lengths[seed % len(lengths)] for seed in range(num_groups * size))
    names = ("stage alone", "MB", "s", "tokens/s", "MB/s", "us of CPU a token", "tokens/s (smallest to largest)")
    table = Table(*names, box=MARKDOWN)
    for name, times in stages.times.items():
        wall = statistics.median(seconds for seconds, _ in times)
        cpu = statistics.median(seconds for _, seconds in times)
        rates = [num_tokens / seconds for seconds, _ in times]
        table.add_row(
            name, f"{stages.num_bytes[name] / 1e6:.0f}", f"{wall:.2f}", f"{num_tokens / wall:,.0f}",
            f"{stages.num_bytes[name] / wall / 1e6:.0f}", f"{cpu / num_tokens * 1e6:.3f}",
            f"{min(rates):,.0f} to {max(rates):,.0f}",
        )  # fmt: skip
    console.print(f"{num_groups} groups of {size}, {num_tokens / 1e6:.2f} million tokens, {repeats} rounds")
    console.print(table)
    return {"num_tokens": num_tokens, "times": stages.times, "num_bytes": stages.num_bytes}
