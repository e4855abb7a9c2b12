"""The role `collect`: samples and grades responses, stores them in the journal, and feeds them to the trainer."""

import asyncio
import logging
import signal
import sys
from contextlib import AsyncExitStack, suppress
from functools import partial

from minpro_megatron.buffer.journal import Journal
from minpro_megatron.checkpoints.resume_point import read_latest
from minpro_megatron.collector.api import CollectorApi
from minpro_megatron.collector.collector import Collector
from minpro_megatron.collector.tracing import TracingObserver, collector_recorder, traced_clients, traced_groups
from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import SUCCEEDED, TERMINATED, ProjectError, RunBlocked, report, report_unexpected
from minpro_megatron.evaluation.in_run import EvaluationSet, benchmark_sets
from minpro_megatron.fleet.episode_rules import episode_rules
from minpro_megatron.fleet.fleet import Fleet, start_limit_s
from minpro_megatron.fleet.generation import GroupCollector
from minpro_megatron.fleet.member import client_maker
from minpro_megatron.fleet.open_files import raise_file_limit
from minpro_megatron.fleet.server_status import ServerStatus
from minpro_megatron.models.model_files import read_model_facts
from minpro_megatron.monitor.memory import MemoryStatement
from minpro_megatron.monitor.repeated_lines import limit_repeated_lines
from minpro_megatron.monitor.status import write_status
from minpro_megatron.monitor.watchdog import Watchdog
from minpro_megatron.prompts.prompts import (
    PromptStream,
    TokenizedPrompt,
    load_prompts,
    refuse_too_few,
    select_prompts,
    tokenize,
)
from minpro_megatron.prompts.rendering import make_rendering
from minpro_megatron.prompts.tokenizer import TextTokenizer
from minpro_megatron.rewards.graders import Graders
from minpro_megatron.run_folder.start_fence import LOOK_EVERY_S, StartFence
from minpro_megatron.serving.answer_processes import AnswerProcesses

log = logging.getLogger(__name__)

# Maximum time for which a thread that encodes a batch or writes the journal holds the interpreter while the event loop,
# which releases it at each read of a socket, waits for it. With Python's default of 5 ms, answers would then arrive at
# 64 KiB per 5 ms.
SWITCH_INTERVAL_S = 0.0005
# Time for which a failed collector still answers a trainer that is between two requests.
FAILURE_DELIVERY_S = 1.0


def run(config: RunConfig, incarnation: int) -> int:
    """Collects until the trainer has finished (exit status 0), something fails (1; 2 for errors that a user
    has to correct), SIGTERM arrives (143), or the run folder no longer belongs to this start (2)."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s collect %(levelname)s %(message)s")
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    limit_repeated_lines("asyncio", "aiohttp.server")  # messages about unauthenticated connections to the port
    raise_file_limit(config)
    fence = StartFence(config.run_dir, incarnation)
    try:
        with fence.explaining():
            asyncio.run(_until_terminated(config, incarnation, fence))
        fence.check()
    except asyncio.CancelledError:
        return TERMINATED
    except RunBlocked as error:  # the status now belongs to another start
        return report(error, "collect")
    except ProjectError as error:
        status = report(error, "collect")
    except Exception:
        status = report_unexpected("collect")
    else:
        write_status(config.run_dir, "collect", "finished")
        return SUCCEEDED
    with suppress(OSError):
        write_status(config.run_dir, "collect", "failed")
    return status


async def _until_terminated(config: RunConfig, incarnation: int, fence: StartFence) -> None:
    """Raises RunBlocked once the fence does."""
    work = asyncio.create_task(_collect(config, incarnation, fence))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, work.cancel)
    watch = asyncio.create_task(_watch_start(fence))
    await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
    if watch.done():
        work.cancel()
        await asyncio.wait({work})
        watch.result()
    watch.cancel()
    await work


async def _watch_start(fence: StartFence) -> None:
    while True:
        await asyncio.to_thread(fence.check)
        await asyncio.sleep(LOOK_EVERY_S)


async def _collect(config: RunConfig, incarnation: int, fence: StartFence) -> None:
    write_status(config.run_dir, "collect", "starting")
    async with AsyncExitStack() as stack:
        watchdog = Watchdog(config.run_dir / "logs" / "stacks-collect.txt", config.debug.hang_timeout_s)
        memory = MemoryStatement(config.run_dir, "collect")
        stack.callback(asyncio.create_task(_show_life(watchdog, memory)).cancel)
        journal = await Journal.open(config.run_dir, fence.check)
        stack.push_async_callback(journal.close)
        api = CollectorApi(config.run_dir, config.collector.host, config.collector.port, incarnation)
        await stack.enter_async_context(api)
        try:
            collector = await _make_collector(config, incarnation, journal, stack)
        except Exception as error:
            api.fail(_one_line(error))
            await api.wait_until_failure_is_reported(FAILURE_DELIVERY_S)
            raise
        api.serve(collector)
        try:
            await collector.run()
        except Exception as error:
            await collector.fail(_one_line(error))
            await api.wait_until_failure_is_reported(FAILURE_DELIVERY_S)
            raise


async def _show_life(watchdog: Watchdog, memory: MemoryStatement) -> None:
    """Renews the watchdog's guard while the event loop runs."""
    while True:
        with watchdog.guard("the collector's event loop"):
            await asyncio.sleep(1)
        await asyncio.to_thread(memory.tick)


async def _make_collector(config: RunConfig, incarnation: int, journal: Journal, stack: AsyncExitStack) -> Collector:
    facts = read_model_facts(config.model.hf_path, config.sampling.extra_stop_tokens)
    tokenizer = TextTokenizer(config.model.hf_path, facts)
    training, heldout, benchmarks = await asyncio.to_thread(_read_prompts, config, tokenizer)
    graders = await stack.enter_async_context(Graders(config.reward))
    stack.callback(partial(_log_failed_grades, graders))
    answers = stack.enter_context(AnswerProcesses(facts))
    recorder, make_client = collector_recorder(config, incarnation), client_maker(config, facts, answers.check)
    if recorder is not None:
        stack.callback(recorder.close)
        make_client = traced_clients(make_client, recorder)
    fleet = await stack.enter_async_context(Fleet(config, facts, incarnation, make_client))
    episodes = await episode_rules(config, facts, tokenizer, stack)
    collect_group, observer = GroupCollector(fleet, graders, tokenizer, episodes).collect, None
    if recorder is not None:
        collect_group, observer = traced_groups(collect_group, recorder), TracingObserver(recorder)
    stream = PromptStream(training, config)
    collector = Collector(config, journal, stream, heldout, collect_group, fleet, benchmarks, graders.metrics, observer)
    manifest = read_latest(config.run_dir)
    version = 0 if manifest is None else manifest.policy_version
    await collector.restore(version, None if manifest is None else manifest.num_global_steps)
    write_status(config.run_dir, "collect", "waiting for the servers")
    await fleet.wait_until_ready(start_limit_s(config.server))
    if version or config.publishes_at_start:
        write_status(config.run_dir, "collect", f"waiting until the trainer has published version {version}")
    stack.callback(asyncio.create_task(_show_servers(config, fleet)).cancel)
    return collector


async def _show_servers(config: RunConfig, fleet: Fleet) -> None:
    status = ServerStatus(config.run_dir)
    while True:
        await asyncio.to_thread(status.tick, len(fleet.members()))
        await asyncio.sleep(1)


def _read_prompts(
    config: RunConfig, tokenizer: TextTokenizer
) -> tuple[list[TokenizedPrompt], list[TokenizedPrompt], list[EvaluationSet]]:
    longest, wanted = config.sampling.max_prompt_tokens, config.evaluation.num_prompts
    rendering = make_rendering(config.data, config.model.hf_path)
    training = select_prompts(load_prompts(config.data.train_file, "data.train_file"), config.data)
    heldout = load_prompts(config.data.heldout_file, "data.heldout_file")
    refuse_too_few(heldout, config.data.heldout_file, wanted)
    return (
        tokenize(training, tokenizer, longest, "data.train_file", rendering),
        tokenize(heldout[:wanted], tokenizer, longest, "data.heldout_file", rendering),
        benchmark_sets(config, tokenizer, rendering),
    )


def _log_failed_grades(graders: Graders) -> None:
    if graders.num_failed or graders.num_timed_out:
        log.warning(
            "responses without a reward since the start: grader failed for %d, exceeded its time for %d",
            graders.num_failed, graders.num_timed_out,
        )  # fmt: skip


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ProjectError) else f"{type(error).__name__}: {text}"
