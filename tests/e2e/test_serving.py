"""A server of each engine on the CPU, a real SGLang too: started, asked, given new weights, stopped."""

import asyncio
import functools
import itertools
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import pytest
import torch

from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.config.run import RunConfig
from minpro_megatron.fleet import suspension
from minpro_megatron.fleet.fleet import Fleet
from minpro_megatron.fleet.generation import GroupCollector
from minpro_megatron.models.model_files import read_model_facts
from minpro_megatron.records import CollectedGroup, IssuedGroup, Prompt, ServerAddress
from minpro_megatron.serving import client as client_module
from minpro_megatron.serving.answers import AnswerChecker, SampledSequence
from minpro_megatron.serving.api_key import authorization
from minpro_megatron.serving.calls import for_all
from minpro_megatron.serving.client import MAX_ATTEMPTS, SamplingParameters, ServerClient
from minpro_megatron.serving.control import ControlError, ServerControl
from minpro_megatron.serving.endpoints import write_server_address
from minpro_megatron.serving.errors import WrongPolicyVersion
from minpro_megatron.serving.handover import release_memory
from minpro_megatron.serving.server_process import ServerProcess, stop_servers
from tests.e2e.random_models import (
    log_probs_by_transformers,
    model_of_transformers,
    routes_by_transformers,
    save_random_model,
)
from tests.mesh.harness import run_mesh
from tests.support.faulty_proxy import FaultyProxy
from tests.support.running_fleet import FAULTS, FakeRewards, FakeTokenizer, until

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU engine's stand-ins are not for GPU machines"),
]

PROMPTS = [[5, 6, 7], [20, 21, 22, 23, 24, 25], [9]]
MAX_RESPONSE_TOKENS = 48  # that the server is started for
NUM_STREAMS = 24  # of responses, sampled at the same time
# what SGLang samples on the CPU does not follow from the seed
GREEDY = SamplingParameters(0.0, MAX_RESPONSE_TOKENS, with_routes=True)
KEY = "k-9d1f77ab"
type PauseMode = Literal["abort", "retract", "in_place"]
# Of SGLang: HTTP, scheduler, detokenizer.
NUM_PROCESSES = {"reference": 1, "sglang": 3}


def on(engine: str) -> pytest.MarkDecorator:
    """The test with this engine; with the other one it is long. What an engine itself does is asked of SGLang, and what
    happens on the way to it of the reference engine, which starts sooner."""
    engines = [name if name == engine else pytest.param(name, marks=pytest.mark.long) for name in NUM_PROCESSES]
    return pytest.mark.parametrize("running", engines, indirect=True, scope="module")


@dataclass
class Running:
    config: RunConfig
    server: ServerProcess
    folder: Path
    other_folder: Path

    def client(self, **options: Any) -> ServerClient:
        facts = read_model_facts(str(self.folder))
        return ServerClient(self.server.address, facts, 120, headers=authorization(self.config), **options)

    def control(self) -> ServerControl:
        headers = authorization(self.config)
        return ServerControl(self.server.address, timeout_s=120, vocabulary_size=64, headers=headers)

    def generate(self, version: int, *, temperature: float = 1.0) -> list[list[SampledSequence]]:
        async def main() -> list[list[SampledSequence]]:
            sampling = SamplingParameters(temperature, MAX_RESPONSE_TOKENS)
            async with self.client() as client:
                assert await client.policy_version() == version
                return await asyncio.gather(
                    *(client.generate(prompt, list(range(8)), sampling, version) for prompt in PROMPTS)
                )

        return asyncio.run(main())

    def largest_difference(self, folder: Path, sampled: list[list[SampledSequence]], temperature: float = 1.0) -> float:
        return max(
            float(np.abs(log_probs_by_transformers(folder, prompt, s.token_ids, temperature) - s.log_probs).max())
            for prompt, sequences in zip(PROMPTS, sampled, strict=True)
            for s in sequences[:3]
        )


@pytest.fixture(scope="module")
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with started(tmp_path_factory.mktemp("serving"), request.param) as server:
        yield server


@contextmanager
def started(root: Path, engine: str) -> Iterator[Running]:
    folder, other_folder = root / "hf", root / "other"
    save_random_model(folder, seed=0)
    save_random_model(other_folder, seed=1)
    environment = pytest.MonkeyPatch()
    environment.setenv("THE_KEY", KEY)
    config = RunConfig.model_validate(
        {
            "name": "serving",
            "runs_dir": str(root / "runs"),
            "device": "cpu",
            "model": {
                "hf_path": str(folder),
                "megatron_path": "unused",
                "dtype": "float32",
                "routing_replay": "rollout",
            },
            "data": {"train_file": "unused", "heldout_file": "unused"},
            "sampling": {"max_prompt_tokens": 8, "max_response_tokens": MAX_RESPONSE_TOKENS},
            "staleness": {"mode": "bounded"},
            "publish": {"pause_mode": "in_place"},
            "server": {
                "engine": engine,
                "device": "cpu",
                "dtype": "float32",
                "max_total_tokens": 4096,
                "start_timeout_s": 150,
                "api_key_variable": "THE_KEY",
            },
        }
    )
    server = ServerProcess(config, 0)
    server.start()
    try:
        assert server.wait_until_ready(config.server.start_timeout_s)
        yield Running(config, server, folder, other_folder)
    finally:
        stop_servers([server])
        environment.undo()


@on("sglang")
def test_log_probs_are_those_of_transformers(running: Running) -> None:
    for temperature in (1.0, 0.7):
        sampled = running.generate(version=0, temperature=temperature)
        assert running.largest_difference(running.folder, sampled, temperature) < 1e-4
        lengths = {len(sequence.token_ids) for sequences in sampled for sequence in sequences}
        assert max(lengths) == MAX_RESPONSE_TOKENS
        different = {tuple(sequence.token_ids) for sequence in sampled[0]}
        assert len(different) > 1


TRUNCATED = SamplingParameters(0.8, MAX_RESPONSE_TOKENS, top_k=20, top_p=0.5, with_supports=True, with_routes=True)


def truncated_responses(running: Running) -> list[tuple[list[int], SampledSequence]]:
    async def main() -> list[list[SampledSequence]]:
        async with running.client() as client:
            return await asyncio.gather(*(client.generate(prompt, list(range(8)), TRUNCATED, 0) for prompt in PROMPTS))

    sampled = asyncio.run(main())
    return [(prompt, one) for prompt, sequences in zip(PROMPTS, sampled, strict=True) for one in sequences]


@on("sglang")
def test_kept_ids_are_the_likeliest_and_the_log_probs_are_those_among_them(running: Running) -> None:
    plain_differences, sizes_found = [], set()
    for prompt, sequence in truncated_responses(running):
        assert sequence.supports is not None
        sizes, ids = np.split(sequence.supports, [len(sequence.token_ids)])
        tokens = torch.tensor([prompt + sequence.token_ids.tolist()])
        with torch.no_grad():
            logits = model_of_transformers(running.folder)(tokens).logits[0, len(prompt) - 1 : -1].double()
        log_probs = (logits / TRUNCATED.temperature).log_softmax(-1).numpy()
        for token, kept, own, reported in zip(
            sequence.token_ids, np.split(ids, np.cumsum(sizes)[:-1]), log_probs, sequence.log_probs, strict=True
        ):
            ordered = np.sort(np.exp(own))[::-1]
            wanted = min(TRUNCATED.top_k, int((np.cumsum(ordered) - ordered <= TRUNCATED.top_p).sum()))
            assert abs(np.exp(own[kept]).sum() - ordered[:wanted].sum()) < 1e-4  # two ids may be equally likely
            assert len(kept) == wanted or abs(np.cumsum(ordered)[wanted - 1] - TRUNCATED.top_p) < 1e-4
            assert abs(reported - (own[token] - np.logaddexp.reduce(own[kept]))) < 1e-4
            plain_differences.append(abs(reported - own[token]))
            sizes_found.add(len(kept))
    assert np.mean(plain_differences) > 0.02  # of the softmax over the vocabulary, which the trainer must not take
    assert len(sizes_found) > 3


def _scores_on_rank(mesh: Any, configs: list[RunConfig], sequences: list[Any]) -> list[np.ndarray]:
    from minpro_megatron.actor.model import ModelFeatures, build_model
    from minpro_megatron.actor.policy import Policy
    from minpro_megatron.models.architecture import read_architecture
    from minpro_megatron.weights.hf_files import HfReader
    from minpro_megatron.weights.local import load_hf_tensors

    scores = []
    for config in configs:
        architecture = read_architecture(config.model.hf_path)
        chunks = build_model(architecture, mesh, torch.float32, ModelFeatures(routing_replay=True))
        load_hf_tensors(chunks, architecture, mesh, HfReader(config.model.hf_path))
        scores.append(Policy(config, architecture, chunks, mesh).score(sequences))
    return scores


@on("sglang")
def test_with_kept_ids_the_ratios_of_step_0_are_1_again(running: Running) -> None:
    """Between the server that sampled and a trainer on two tensor-parallel ranks, with the same weights."""
    sequences, first_slot = [], 0
    for prompt, one in truncated_responses(running):
        numbers = {"behavior_log_probs": one.log_probs, "rollout_log_probs": one.log_probs, "advantage": 0.0}
        of_server = {"routed_experts": one.routed_experts, "supports": one.supports, "first_slot": first_slot}
        mask = np.ones(len(one.token_ids), np.float32)
        ids = np.asarray(prompt, np.int32)
        sequences.append(TokenSequence(ids, one.token_ids, mask, **numbers, **of_server))
        first_slot += len(one.token_ids)
    reported = np.concatenate([one.rollout_log_probs for one in sequences])
    configs = []
    for top_k in (TRUNCATED.top_k, 0):
        sampling = running.config.sampling.model_copy(update={"temperature": TRUNCATED.temperature, "top_k": top_k})
        configs.append(running.config.model_copy(update={"sampling": sampling}))
    scores = run_mesh(_scores_on_rank, configs, sequences, deadline_s=300, tensor=2)[0]
    among_kept, among_all = (np.abs(np.exp(one - reported) - 1).max() for one in scores)
    assert among_kept < 1e-3
    assert among_all > 0.1


@on("sglang")
def test_the_key_shows_nowhere(running: Running) -> None:
    assert running.server._process is not None
    process = psutil.Process(running.server._process.pid)
    for member in [process, *process.children(recursive=True)]:
        assert KEY not in " ".join(member.cmdline())
    assert KEY not in running.server.log_file.read_text(errors="replace")
    without = ServerControl(running.server.address, timeout_s=10)
    with pytest.raises(ControlError, match="model_info: status 401"):
        without.model_info()
    without.close()


@on("sglang")
def test_new_weights_are_used_and_their_version_is_reported(running: Running) -> None:
    control = running.control()
    before = control.weights_checksum()
    for_all([control], "pause_generation", mode="retract")
    with pytest.raises(ControlError, match=r"server 0 at .*update_weights_from_disk: status 400"):
        control.update_weights_from_disk(model_path=str(running.folder / "none"), weight_version=1)
    for_all([control], "update_weights_from_disk", model_path=str(running.other_folder), weight_version=1)
    for_all([control], "flush_cache")
    for_all([control], "continue_generation")
    assert control.weights_checksum().engine != before.engine
    assert control.policy_version() == 1
    greedy = control.generate_greedy(PROMPTS[0], 6)
    expected = log_probs_by_transformers(running.other_folder, PROMPTS[0], np.asarray(greedy.token_ids), 1.0)
    assert np.abs(expected - np.asarray(greedy.log_probs)).max() < 1e-4

    sampled = running.generate(version=1)
    assert running.largest_difference(running.other_folder, sampled) < 1e-4
    with pytest.raises(WrongPolicyVersion, match=r"sampled with version \[1\] instead of 2"):
        asyncio.run(_generate_as_version_2(running))
    _load_once_idle(control, running.folder)
    assert control.weights_checksum() == before
    control.close()


@on("sglang")
def test_a_server_gives_its_memory_away_and_takes_it_back_with_other_weights(running: Running) -> None:
    """While requests are under way, which must be ended first: SGLang ends when it releases memory while it is busy."""
    control = running.control()
    before = control.weights_checksum()
    asyncio.run(_release_while_sampling(running, control))
    assert control.policy_version() == 0  # it answers, and is not taken for dead
    control.resume_memory_occupation(tags=["weights"])
    control.update_weights_from_disk(model_path=str(running.other_folder), weight_version=1, flush_cache=False)
    assert control.weights_checksum().engine != before.engine
    control.resume_memory_occupation(tags=["kv_cache"])
    control.continue_generation()
    sampled = running.generate(version=1)
    assert running.largest_difference(running.other_folder, sampled) < 1e-4
    release_memory(control)
    for part in ("weights", "kv_cache"):
        control.resume_memory_occupation(tags=[part])
    control.update_weights_from_disk(model_path=str(running.folder), weight_version=0)
    control.continue_generation()
    assert control.weights_checksum() == before
    control.close()


async def _release_while_sampling(running: Running, control: ServerControl) -> None:
    """Responses are under way when the release is asked for; what it aborts is not continued."""
    sampling = SamplingParameters(1.0, MAX_RESPONSE_TOKENS)
    async with running.client() as client:
        requests = [asyncio.create_task(client.generate(PROMPTS[0], [seed], sampling, 0)) for seed in range(64)]
        await asyncio.wait(requests, return_when=asyncio.FIRST_COMPLETED)
        releasing = asyncio.create_task(asyncio.to_thread(release_memory, control))
        await asyncio.wait([releasing])
        for request in requests:  # those that the release has aborted wait in the server to be continued
            request.cancel()
        await asyncio.wait(requests)
        releasing.result()


@pytest.mark.long
@pytest.mark.parametrize("running", NUM_PROCESSES, indirect=True, scope="module")
def test_a_request_that_comes_between_the_proof_and_the_release_waits_for_the_new_weights(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    control, sampling = running.control(), SamplingParameters(1.0, MAX_RESPONSE_TOKENS)
    release = ServerControl.release_memory_occupation

    async def main() -> list[SampledSequence]:
        loop, requests = asyncio.get_running_loop(), list[asyncio.Task[list[SampledSequence]]]()

        def release_late(self: ServerControl, **arguments: Any) -> None:
            loop.call_soon_threadsafe(
                lambda: requests.append(asyncio.create_task(client.generate(PROMPTS[0], [1], sampling, 1)))
            )
            time.sleep(1)
            release(self, **arguments)

        monkeypatch.setattr(ServerControl, "release_memory_occupation", release_late)
        async with running.client(exact_versions=True) as client:
            await asyncio.to_thread(release_memory, control)
            await asyncio.sleep(0.5)
            [request] = requests
            assert not request.done()
            await asyncio.to_thread(control.resume_memory_occupation, tags=["weights", "kv_cache"])
            folder = str(running.other_folder)
            await asyncio.to_thread(control.update_weights_from_disk, model_path=folder, weight_version=1)
            assert not request.done()
            await asyncio.to_thread(control.continue_generation)
            return await request

    [sampled] = asyncio.run(main())
    expected = log_probs_by_transformers(running.other_folder, PROMPTS[0], sampled.token_ids, 1.0)
    assert np.abs(expected - sampled.log_probs).max() < 1e-4
    _load_once_idle(control, running.folder)
    control.close()


@pytest.mark.long
def test_a_busy_sglang_is_never_asked_to_release_its_memory_for_it_would_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were generation not paused first, the state check would refuse, and the requests go on."""
    sampling = SamplingParameters(1.0, MAX_RESPONSE_TOKENS)

    async def main(running: Running, control: ServerControl) -> None:
        async with running.client() as client:

            async def keep_busy(seed: int) -> None:
                while True:
                    await client.generate(PROMPTS[0], [seed], sampling, 0)
                    answered.set()

            answered = asyncio.Event()
            requests = [asyncio.create_task(keep_busy(seed)) for seed in range(16)]
            await answered.wait()
            with pytest.raises(ControlError, match="flush_cache: status 400"):
                await asyncio.to_thread(release_memory, control, 1.0)
            answered.clear()
            await answered.wait()
            with suppress(ControlError):  # what the check is for
                await asyncio.to_thread(control.release_memory_occupation, tags=["kv_cache", "weights"])
            await asyncio.wait(requests, return_when=asyncio.FIRST_EXCEPTION)
            for request in requests:
                request.cancel()
            await asyncio.wait(requests)

    with started(tmp_path, "sglang") as running:
        control = running.control()
        monkeypatch.setattr(ServerControl, "pause_generation", lambda self, mode: None)
        asyncio.run(main(running, control))
        control.close()
        assert until_ended(running.server)
        assert (
            "release_memory_occupation should be called only when server is idle" in running.server.log_file.read_text()
        )


def until_ended(server: ServerProcess) -> bool:
    deadline = time.monotonic() + 60
    while server.exit_status is None and time.monotonic() < deadline:
        time.sleep(0.2)
    return server.exit_status is not None


def _load_once_idle(control: ServerControl, folder: Path) -> None:
    """A server that has just answered may hold the request for a moment, and then refuses to flush its cache."""
    deadline = time.monotonic() + 10
    while True:
        try:
            control.update_weights_from_disk(model_path=str(folder), weight_version=0)
            return
        except ControlError as error:
            if "requests are still running" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.1)


async def _generate_as_version_2(running: Running) -> None:
    sampling = SamplingParameters(1.0, MAX_RESPONSE_TOKENS)
    async with running.client() as client:
        await client.generate(PROMPTS[0], [1], sampling, policy_version=2)


@on("sglang")
def test_what_an_update_aborts_is_continued_with_its_log_probs_versions_and_routes(running: Running) -> None:
    """The same weights under two versions: a response over both must look like one forward pass."""
    sampled, both = _sampled_over_updates(running, "abort", running.folder)
    lengths = {len(sequence.token_ids) for _, sequence in sampled}
    assert max(lengths) == MAX_RESPONSE_TOKENS  # not cut short by the server's context length
    for prompt, sequence in both[:3]:
        assert sequence.finish_reason == ("stop" if sequence.token_ids[-1] == 1 else "length")
        assert sequence.finish_reason == "stop" or len(sequence.token_ids) == MAX_RESPONSE_TOKENS
        expected = log_probs_by_transformers(running.folder, prompt, sequence.token_ids, 1.0)
        assert np.abs(expected - sequence.log_probs).max() < 1e-4
        tokens = prompt + sequence.token_ids.tolist()
        assert sequence.routed_experts is not None
        assert np.array_equal(np.sort(sequence.routed_experts), routes_by_transformers(running.folder, tokens[:-1]))


@on("sglang")
@pytest.mark.parametrize("mode", ["in_place", "retract", "abort"])
def test_each_token_was_sampled_by_the_weights_of_its_version(
    running: Running, monkeypatch: pytest.MonkeyPatch, mode: PauseMode
) -> None:
    """Other weights come while responses are under way. Each log-prob is that of the version which the token is said to
    be of, also of the first token after the change. The routes are of the same weights, but not after a retraction,
    which is why model.routing_replay = rollout refuses that in bounded mode."""
    # the client would have such responses sampled again
    monkeypatch.setattr(AnswerChecker, "_routes_are_lost", lambda *_: False)
    sampled, both = _sampled_over_updates(running, mode, running.other_folder)
    for prompt, sequence in sampled:
        expected = log_probs_by_version(running, prompt, sequence, cache_is_kept=mode == "in_place")
        assert np.abs(expected - sequence.log_probs).max() < 1e-4
    for prompt, sequence in both:
        first_part = prompt + sequence.token_ids[sequence.policy_versions == 0].tolist()[:-1]
        assert sequence.routed_experts is not None
        found = np.sort(sequence.routed_experts[: len(first_part)])
        routes_of = running.other_folder if mode == "retract" else running.folder
        assert np.array_equal(found, routes_by_transformers(routes_of, first_part))


def log_probs_by_version(
    running: Running, prompt: list[int], sequence: SampledSequence, cache_is_kept: bool
) -> np.ndarray:
    """Of a response whose tokens of version 0 the first weights sampled, and those of version 1 the others."""
    num_old = int((sequence.policy_versions == 0).sum())
    if num_old == len(sequence.token_ids):
        return log_probs_by_transformers(running.folder, prompt, sequence.token_ids, 1.0)
    tokens = prompt + sequence.token_ids.tolist()
    first = len(prompt) + num_old - 1 if num_old else 0  # the first token that the others process
    old, new = model_of_transformers(running.folder), model_of_transformers(running.other_folder)
    with torch.no_grad():
        before = old(torch.tensor([tokens[:first] or tokens[:1]]), use_cache=True)
        if cache_is_kept and num_old:
            after = new(torch.tensor([tokens[first:-1]]), past_key_values=before.past_key_values).logits[0]
        else:
            after = new(torch.tensor([tokens[:-1]])).logits[0, first:]
    logits = torch.cat([before.logits[0, :first], after]).double()
    chosen = logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])
    return chosen[len(prompt) - 1 :, 0].numpy()


def _sampled_over_updates(
    running: Running, mode: PauseMode, folder: Path
) -> tuple[list[tuple[list[int], SampledSequence]], list[tuple[list[int], SampledSequence]]]:
    """Prompts and responses of `_sampled_over_an_update`, and those of them that are of both versions: at least 3."""
    sampled: list[tuple[list[int], SampledSequence]] = []
    both: list[tuple[list[int], SampledSequence]] = []
    for number in range(8):  # a fast server may have answered all that it has begun before the pause comes
        found = _sampled_over_an_update(running, mode, folder, keep_coming=number % 2 == 0)
        sampled += found
        both += [pair for pair in found if len(set(pair[1].policy_versions.tolist())) == 2]
        if number and len(both) >= 3:
            break
    assert len(both) >= 3
    return sampled, both


def _sampled_over_an_update(
    running: Running, mode: PauseMode, folder: Path, keep_coming: bool
) -> list[tuple[list[int], SampledSequence]]:
    """Prompts and responses before, over and after an update from version 0 to 1, the weights in `folder`.

    Each response that ends is followed by another. So there are many under way when the pause comes, however fast the
    server is; and it comes when as many have ended, so those have tokens, however slow it is. With `keep_coming` others
    follow until the pause, which then often meets a prompt; otherwise it meets the next token of all that are left.
    """
    control = running.control()
    sampling = SamplingParameters(1.0, MAX_RESPONSE_TOKENS, with_routes=True)
    sampled: list[tuple[list[int], SampledSequence]] = []

    async def main() -> None:
        is_paused, enough = asyncio.Event(), asyncio.Event()

        async def one_after_the_other(first_seed: int) -> None:
            prompt = PROMPTS[first_seed % len(PROMPTS)]
            for seed in itertools.count(first_seed, NUM_STREAMS):
                sampled.extend((prompt, one) for one in await client.generate(prompt, [seed], sampling, 0))
                if len(sampled) >= NUM_STREAMS:
                    enough.set()
                if is_paused.is_set() or (enough.is_set() and not keep_coming):
                    return

        async with running.client(exact_versions=False) as client, asyncio.TaskGroup() as streams:
            for first_seed in range(NUM_STREAMS):
                streams.create_task(one_after_the_other(first_seed))
            await enough.wait()
            await asyncio.to_thread(control.pause_generation, mode)
            is_paused.set()
            load = functools.partial(control.update_weights_from_disk, model_path=str(folder), weight_version=1)
            await asyncio.to_thread(load, flush_cache=mode != "in_place")  # it is in use then
            await asyncio.to_thread(control.continue_generation)

    asyncio.run(main())
    control.update_weights_from_disk(model_path=str(running.folder), weight_version=0)
    control.close()
    return sampled


@pytest.fixture
def version_one(running: Running, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The server holds the same weights as version 1: there is an older version to lie about. Pauses are short."""
    monkeypatch.setattr(suspension, "FIRST_SUSPENSION_S", 0.05)
    monkeypatch.setattr(client_module, "FIRST_PAUSE_S", 0.02)
    control = running.control()
    control.update_weights_from_disk(model_path=str(running.folder), weight_version=1)
    yield
    control.pause_generation("abort")  # a request of which the fleet no longer waits for an answer may still run
    control.update_weights_from_disk(model_path=str(running.folder), weight_version=0)
    control.continue_generation()
    control.close()


class Undisturbed:
    """What the server itself answers to a group, without proxy and fleet, and how long that takes."""

    def __init__(self, running: Running) -> None:
        self._folder = running.folder
        begin = time.monotonic()
        self._sequences = asyncio.run(self._generate(running))
        self.wall_time_s = time.monotonic() - begin

    async def _generate(self, running: Running) -> list[SampledSequence]:
        async with running.client() as client:
            return await client.generate(PROMPTS[0], issued_group(0, 1).sampling_seeds, GREEDY, 1)

    def check(self, group: CollectedGroup) -> None:
        """The group has the very same tokens and routes, with log-probs that are also transformers' own."""
        assert len(group.responses) == len(self._sequences)
        for response, expected in zip(group.responses, self._sequences, strict=True):
            assert response.token_ids.tolist() == expected.token_ids.tolist()
            assert response.finish_reason == expected.finish_reason
            assert (response.policy_versions == 1).all()
            assert np.abs(response.rollout_log_probs - expected.log_probs).max() < 1e-4
            computed = log_probs_by_transformers(self._folder, PROMPTS[0], response.token_ids, 1.0)
            assert np.abs(response.rollout_log_probs - computed).max() < 1e-4
            assert response.routed_experts is not None
            assert expected.routed_experts is not None
            assert np.array_equal(np.sort(response.routed_experts), np.sort(expected.routed_experts))


@asynccontextmanager
async def fleet_behind_a_proxy(
    running: Running, request_timeout_s: float = 120
) -> AsyncIterator[tuple[FaultyProxy, Fleet, GroupCollector]]:
    """A fleet that knows the server by a proxy's address only, and works with version 1."""
    server = running.config.server.model_copy(update={"request_timeout_s": request_timeout_s})
    config = running.config.model_copy(update={"server": server})
    async with (
        FaultyProxy(running.server.address.url) as proxy,
        Fleet(config, read_model_facts(str(running.folder)), 0) as fleet,
    ):
        config.run_dir.mkdir(parents=True, exist_ok=True)
        write_server_address(config.run_dir, ServerAddress(index=0, url=proxy.url, tensor_parallel=1), 0)
        await fleet.wait_until_ready(60)
        fleet.set_version(1, [0])
        await until(lambda: fleet.metrics()["fleet/current"] == 1)
        yield proxy, fleet, GroupCollector(fleet, FakeRewards(), FakeTokenizer())  # type: ignore[arg-type]


def failures(fleet: Fleet) -> dict[str, float]:
    """What has failed, by kind."""
    found = {name.removeprefix("fleet/"): count for name, count in fleet.metrics().items()}
    return {name: count for name, count in found.items() if name.startswith(("failures/", "invalid_answers/"))}


@on("reference")
@pytest.mark.usefixtures("version_one")
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_on_the_way_is_counted_and_changes_nothing_that_comes_out(
    running: Running, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Through a proxy: the fleet asks again, and what arrives is what the server answers without one."""
    fault, metric = FAULTS[name]
    undisturbed = Undisturbed(running)
    # far longer than the server takes, however busy this machine is
    limit_s = max(1.0, 10 * undisturbed.wall_time_s)
    if name == "drip":
        monkeypatch.setattr(client_module, "BODY_TIMEOUT_S", 1.0)
    # the client itself repeats the requests that it may repeat at once
    times = MAX_ATTEMPTS if metric in ("failures/connection", "failures/status") else 1

    async def main() -> None:
        limits = (limit_s,) if name == "hang" else ()
        async with fleet_behind_a_proxy(running, *limits) as (proxy, fleet, groups):
            proxy.fail(getattr(proxy, fault) if isinstance(fault, str) else fault, times)
            undisturbed.check(await groups.collect(issued_group(0, 1), GREEDY))
            assert proxy.num_faults == times
            found = failures(fleet)
            assert found.keys() == {metric}
            # a machine that stands still for a while may let a sound answer run out of time too
            assert found[metric] == fleet.metrics()["fleet/retries"] >= 1
            undisturbed.check(await groups.collect(issued_group(1, 1), GREEDY))
            assert fleet.metrics()["fleet/groups"] == 2

    asyncio.run(main())


@on("reference")
@pytest.mark.usefixtures("version_one")
def test_refused_connections_are_counted_and_the_group_waits_for_the_port(running: Running) -> None:
    undisturbed = Undisturbed(running)

    async def main() -> None:
        async with fleet_behind_a_proxy(running) as (proxy, fleet, groups):
            await proxy.refuse()
            work = asyncio.create_task(groups.collect(issued_group(0, 1), GREEDY))
            await until(lambda: fleet.members() == [] and fleet.metrics()["fleet/groups_waiting"] == 1)
            assert failures(fleet) == {"failures/connection": 1}
            await proxy.listen_again()
            undisturbed.check(await work)
            assert failures(fleet) == {"failures/connection": 1}
            assert [address.index for address in fleet.members()] == [0]

    asyncio.run(main())


def issued_group(group_id: int, version: int) -> IssuedGroup:
    return IssuedGroup(
        group_id=group_id,
        batch_index=0,
        policy_version=version,
        prompt=Prompt(id=str(group_id), source="test", text="1=", answer="1"),
        prompt_token_ids=np.asarray(PROMPTS[0], dtype=np.int32),
        sampling_seeds=[2 * group_id, 2 * group_id + 1],
    )


@on("sglang")
def test_it_stops_with_all_its_processes(running: Running) -> None:
    """The last test: it ends the server."""
    assert running.server._process is not None
    process = psutil.Process(running.server._process.pid)
    members = [process, *process.children(recursive=True)]
    assert len(members) >= NUM_PROCESSES[running.config.server.engine]
    begin = time.monotonic()
    stop_servers([running.server])
    assert time.monotonic() - begin < 30
    assert not any(member.is_running() and member.status() != psutil.STATUS_ZOMBIE for member in members)
