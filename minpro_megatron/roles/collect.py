"""The role `collect`: prompts through servers and rewards into the journal, and from there to the trainer."""

import asyncio
import logging
import signal
import sys
import time
from contextlib import AsyncExitStack, suppress
from functools import partial

from minpro_megatron.config.run import RunConfig
from minpro_megatron.monitor.status import write_status
from minpro_megatron.records import ServerAddress
from minpro_megatron.rewards.pool import RewardPool
from minpro_megatron.rollout.api import CollectorApi
from minpro_megatron.rollout.collector import Collector
from minpro_megatron.rollout.generation import GroupCollector
from minpro_megatron.rollout.journal import Journal
from minpro_megatron.rollout.prompts import PromptStream, TokenizedPrompt, load_prompts, tokenize
from minpro_megatron.rollout.tokenizer import TextTokenizer
from minpro_megatron.serving.client import ServerClient
from minpro_megatron.serving.endpoints import read_server_addresses
from minpro_megatron.serving.model_files import ModelFacts, read_model_facts

log = logging.getLogger(__name__)

# serve reports a server that does not start after server.start_timeout_s; collect waits a little longer
# than that.
START_MARGIN_S = 60.0
# How long a failed collector stays to answer a trainer that is between two requests.
FAILURE_DELIVERY_S = 1.0
STATUS_TERMINATED = 128 + signal.SIGTERM
# More groups than fit: the server's queue then always holds the next one when responses of different
# lengths end.
QUEUE_FACTOR = 1.25


class StartError(RuntimeError):
    """The collector cannot begin; the message is one line with the reason."""


def run(config: RunConfig, incarnation: int) -> int:
    """Collects until the trainer has finished (exit status 0), something fails (1) or SIGTERM comes (143)."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s collect %(levelname)s %(message)s")
    try:
        asyncio.run(_until_terminated(config, incarnation))
    except asyncio.CancelledError:
        return STATUS_TERMINATED
    except Exception as error:
        log.debug("the failure in full", exc_info=True)
        print(f"collect: {_one_line(error)}", file=sys.stderr)
        with suppress(OSError):
            write_status(config.run_dir, "collect", "failed")
        return 1
    write_status(config.run_dir, "collect", "finished")
    return 0


async def _until_terminated(config: RunConfig, incarnation: int) -> None:
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    write_status(config.run_dir, "collect", "starting")
    async with AsyncExitStack() as stack:
        journal = await Journal.open(config.run_dir)
        stack.push_async_callback(journal.close)
        api = CollectorApi(config.run_dir, config.collector.host, config.collector.port, incarnation)
        await stack.enter_async_context(api)
        try:
            collector = await _make_collector(config, incarnation, journal, stack)
        except Exception as error:
            api.fail(_one_line(error))
            await api.wait_until_failure_is_told(FAILURE_DELIVERY_S)
            raise
        api.serve(collector)
        try:
            await collector.run()
        except Exception as error:
            await collector.fail(_one_line(error))
            await api.wait_until_failure_is_told(FAILURE_DELIVERY_S)
            raise


async def _make_collector(config: RunConfig, incarnation: int, journal: Journal, stack: AsyncExitStack) -> Collector:
    facts = read_model_facts(config.model.hf_path)
    tokenizer = TextTokenizer(config.model.hf_path, facts)
    training, heldout = await asyncio.to_thread(_read_prompts, config, tokenizer)
    rewards = RewardPool(config.collector.reward, config.collector.reward_workers, config.collector.reward_timeout_s)
    await stack.enter_async_context(rewards)
    addresses = await _wait_for_servers(config, incarnation)
    clients = [await _connect(address, facts, config, stack) for address in addresses]
    responses_per_prompt = config.batch.responses_per_prompt
    groups_per_server = max(1, round(QUEUE_FACTOR * config.server.max_running_requests / responses_per_prompt))
    groups = GroupCollector(clients, rewards, tokenizer, groups_per_server)
    stack.callback(partial(_log_rewards, rewards))
    return Collector(config, journal, PromptStream(training, config), heldout, groups.collect, addresses)


def _read_prompts(config: RunConfig, tokenizer: TextTokenizer) -> tuple[list[TokenizedPrompt], list[TokenizedPrompt]]:
    longest, wanted = config.sampling.max_prompt_tokens, config.evaluation.num_prompts
    training = load_prompts(config.data.train_file, "data.train_file")
    heldout = load_prompts(config.data.heldout_file, "data.heldout_file")
    if len(heldout) < wanted:
        raise StartError(
            f"evaluation.num_prompts = {wanted}: data.heldout_file = {config.data.heldout_file!r} has only "
            f"{len(heldout)} rows; lower evaluation.num_prompts"
        )
    return (
        tokenize(training, tokenizer, longest, "data.train_file"),
        tokenize(heldout[:wanted], tokenizer, longest, "data.heldout_file"),
    )


async def _wait_for_servers(config: RunConfig, incarnation: int) -> list[ServerAddress]:
    write_status(config.run_dir, "collect", "waiting for the servers")
    limit_s = config.server.start_timeout_s + START_MARGIN_S
    deadline = time.monotonic() + limit_s
    while True:
        addresses = read_server_addresses(config.run_dir, config.server.count, incarnation)
        if len(addresses) == config.server.count:
            return addresses
        if time.monotonic() > deadline:
            raise StartError(
                f"{len(addresses)} of server.count = {config.server.count} servers ready after {limit_s:g} s "
                "(server.start_timeout_s and a margin); see the log of serve"
            )
        await asyncio.sleep(0.1)


async def _connect(address: ServerAddress, facts: ModelFacts, config: RunConfig, stack: AsyncExitStack) -> ServerClient:
    client = await stack.enter_async_context(ServerClient(address, facts, config.server.request_timeout_s))
    if (version := await client.policy_version()) != 0:
        raise StartError(f"{client.name} holds policy version {version}, but a run starts from version 0; restart it")
    return client


def _log_rewards(rewards: RewardPool) -> None:
    if rewards.num_killed or rewards.num_errors:
        log.warning(
            "responses given reward 0 without grading: grader killed for %d, grader failed for %d",
            rewards.num_killed, rewards.num_errors,
        )  # fmt: skip


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, RuntimeError | ValueError) and text else f"{type(error).__name__}: {text}"
