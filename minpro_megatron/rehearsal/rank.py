"""Rehearses one rank: the real policy of a run on fake tensors, phase by phase."""

import functools
import logging
import resource
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from torch._subclasses.fake_tensor import FakeTensorMode

from minpro_megatron.batching.supports import support_array
from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.config.run import RunConfig
from minpro_megatron.models.architecture import Architecture
from minpro_megatron.planning.update_rows import padded_lengths
from minpro_megatron.publishing.canary_count import most_canaries
from minpro_megatron.rehearsal import cuda_without_driver
from minpro_megatron.rehearsal.comparison import compare_with_plan
from minpro_megatron.rehearsal.kinds import place_of
from minpro_megatron.rehearsal.observer import Observer
from minpro_megatron.rehearsal.record import RankRehearsal
from minpro_megatron.rehearsal.subject import (
    CANARIES,
    PARK_STATES,
    PARK_WEIGHTS,
    PUBLISH,
    RETURN,
    UPDATE,
    Rehearsed,
)
from minpro_megatron.rehearsal.transformer_engine import package as transformer_engine

_SNAPSHOT = "sampling"
_LONGEST_PROMPT = 1024
_LEARNING_RATE = 1e-6
_MAX_ERROR = 600  # characters of an exception in a report


def rehearse_rank(what: Rehearsed) -> RankRehearsal:
    """Runs build, score, updates and publication of one rank, and what lies between them: a snapshot, or the moves to
    the host and back of a rank that shares its GPU with servers. Once per process: torch and Megatron are changed for
    the rest of it. Raises UserError for a recipe or a rank that cannot be rehearsed."""
    start = time.monotonic()
    config, architecture = what.checked()
    observer = Observer()
    cuda_without_driver.install(observer.compiled)
    transformer_engine.install()
    _silence_libraries()
    with FakeTensorMode(allow_non_fake_inputs=True), observer, observer.memory.watching_resizes():
        policy = None
        try:
            policy = _run_phases(replace(what, config=config), architecture, observer)
        except Exception as error:  # the code under rehearsal: whatever it raises is a finding
            observer.problems[f"{observer.memory.interrupted}: {_described(error)}"] += 1
        components = []
        if policy is not None:
            components = compare_with_plan(replace(what, config=config), architecture, policy, observer.memory)
        return RankRehearsal(
            recipe=what.recipe,
            rank=what.rank,
            place=place_of(config.parallel, what.rank),
            problems=[f"{text}, {count} times" for text, count in observer.problems.items()],
            phases=list(observer.memory.phases.values()),
            collectives=observer.collectives.found,
            host_reads=observer.host_reads,
            components=components,
            process_peak_bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            seconds=time.monotonic() - start,
        )


def _silence_libraries() -> None:
    """What Megatron-Core and torch say of themselves, and of a machine without a GPU."""
    warnings.simplefilter("ignore")
    for name in ("megatron.core", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _described(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "minpro_megatron" in frame.filename and "/rehearsal/" not in frame.filename]
    place = f" at {ours[-1].filename.split('minpro_megatron/')[-1]}:{ours[-1].lineno}" if ours else ""
    return f"{type(error).__name__}{place}: {' '.join(str(error).split())[:_MAX_ERROR]}"


def _run_phases(what: Rehearsed, architecture: Architecture, observer: Observer) -> Any:
    """The policy, after its phases."""
    from minpro_megatron.actor import garbage
    from minpro_megatron.actor.model import DTYPES, build_model, features_of
    from minpro_megatron.actor.policy import Policy
    from minpro_megatron.rehearsal import publication, unknown_values
    from minpro_megatron.rehearsal.fake_mesh import open_fake_mesh

    config, memory = what.config, observer.memory
    mesh = open_fake_mesh(
        config.parallel, cuda_without_driver.DEVICE, config.seed, what.rank, observer.collectives.backends
    )
    unknown_values.assume_even_routing(observer, what.imbalance)
    unknown_values.keep_rows_of_experts()
    _separate_log_probs(observer)
    with memory.in_phase("build"):
        chunks = build_model(architecture, mesh, DTYPES[config.model.dtype], features_of(config))
        policy = Policy(config, architecture, chunks, mesh)
    _separate_optimizer(policy, observer)
    publish = functools.partial(publication.gather_and_flatten, config, chunks, architecture, mesh)
    canaries = functools.partial(_score_canaries, config, architecture, policy, observer)
    full = _received_shape(config, architecture, config.batch.max_tokens_per_row)
    # as in a run: what reference cycles hold stays until the end of an update
    with garbage.collected_together(), unknown_values.received_shapes(full):
        _run_steps(config, policy, full_rows(config, what.rows), observer, publish, canaries)
    return policy


def _run_steps(
    config: RunConfig,
    policy: Any,
    sequences: list[TokenSequence],
    observer: Observer,
    publish: Callable[[], object],
    score_canaries: Callable[[], None],
) -> None:
    """Two updates and what comes before and after them."""
    from minpro_megatron.actor import garbage

    memory, in_turns = observer.memory, config.server.takes_turns
    with memory.in_phase("score"):
        policy.score(sequences)
    if not in_turns:  # there a batch is scored before the weights that sampled it change
        with memory.in_phase("snapshot"):
            policy.take_snapshot(_SNAPSHOT)
    for name in ("first update", UPDATE):  # the first one makes the optimizer's moments
        with memory.in_phase(name):
            result = policy.update(sequences, _LEARNING_RATE)
            garbage.collect()
        assert result.applied, result
    if in_turns:
        buckets = _publish_in_turns(policy, observer, publish, score_canaries)
        with memory.in_phase("update after the return"):
            policy.update(sequences, _LEARNING_RATE)
        del buckets
        return
    with memory.in_phase("score with a snapshot"), policy.use_snapshot(_SNAPSHOT):
        policy.score(sequences)
    with memory.in_phase(PUBLISH):
        publish()
    score_canaries()


def _publish_in_turns(
    policy: Any, observer: Observer, publish: Callable[[], object], score_canaries: Callable[[], None]
) -> object:
    """What a trainer that shares its GPU with servers does between two updates (Trainer._send and _release). Returns
    the buffers of the publication, which stay for the next one."""
    memory = observer.memory
    with memory.in_phase(PARK_STATES):
        policy.to_host(but_weights=True)
    with memory.in_phase(PUBLISH):
        buckets = publish()
    score_canaries()
    with memory.in_phase(PARK_WEIGHTS):
        policy.to_host()
    with memory.in_phase(RETURN):
        policy.to_device()
    return buckets


def _score_canaries(config: RunConfig, architecture: Architecture, policy: Any, observer: Observer) -> None:
    """One row for every data-parallel rank: the longest one of the most that servers may have generated. Nothing, if a
    run compares no canaries."""
    from minpro_megatron.rehearsal import unknown_values

    most, plan = most_canaries(config), policy._rows
    if not most.count:
        return
    each = padded_lengths(config, [most.prompt_tokens + most.continuation_tokens])
    rows = plan.rows(each * most.count)
    longest = max(range(len(rows.lengths)), key=lambda row: sum(rows.lengths[row]))
    count = len(rows.sequences[longest]) * plan.multiple
    shape = _received_shape(config, architecture, sum(rows.lengths[longest]))
    with observer.memory.in_phase(CANARIES), unknown_values.received_shapes(shape):
        policy.score_canaries([([0] * most.prompt_tokens, [0] * most.continuation_tokens)] * count)


def _received_shape(config: RunConfig, architecture: Architecture, row_tokens: int) -> tuple[int, int, int]:
    """The shape of a rank's hidden states of a row."""
    return row_tokens // config.parallel.context // config.parallel.tensor, 1, architecture.hidden_size


def full_rows(config: RunConfig, rows: int) -> list[TokenSequence]:
    """`rows` full rows for every data-parallel rank: the longest sequence that is allowed, and one for the rest."""
    tokens = config.batch.max_tokens_per_row
    longest = min(config.sampling.max_prompt_tokens + config.sampling.max_response_tokens, tokens)
    # several sequences of equal length, where the longest take less than half a row
    lengths = [longest] * (tokens // longest) + [tokens % longest] * (tokens % longest > 0)
    made: list[TokenSequence] = []
    slot = 0
    for length in lengths * (rows * config.parallel.data_size):
        response = length - min(_LONGEST_PROMPT, length // 2)
        ones, zeros = np.ones(response, np.float32), np.zeros(response, np.float32)
        made.append(
            TokenSequence(
                prompt_ids=np.zeros(length - response, np.int32),
                response_ids=np.zeros(response, np.int32),
                loss_mask=ones,
                behavior_log_probs=zeros,
                rollout_log_probs=zeros,
                advantage=1.0,
                first_slot=slot,
                proximal_log_probs=zeros if config.loss.decoupled.enabled else None,
                reference_log_probs=zeros if config.loss.kl.enabled else None,
                staleness=np.zeros(response, np.int32),
                supports=full_supports(response, config.sampling.top_k),
            )
        )
        slot += response
    return made


def full_supports(num_tokens: int, top_k: int) -> np.ndarray | None:
    """Supports of `top_k` ids for each token, the most that there usually are; None without truncated sampling."""
    if not top_k:
        return None
    return support_array(np.full(num_tokens, top_k), np.tile(np.arange(top_k), num_tokens))


def _separate_log_probs(observer: Observer) -> None:
    """Makes phases of the log-probs' forward and backward, whose logits are a component of their own."""
    from minpro_megatron.parallel import log_probs

    function: Any = log_probs._VocabParallelLogProbs
    for name in ("forward", "backward"):
        setattr(function, name, staticmethod(_in_phase(observer, f"log-probs {name}", getattr(function, name))))


def _separate_optimizer(policy: Any, observer: Observer) -> None:
    for name in ("prepare_grads", "get_grad_norm", "step"):
        setattr(policy._optimizer, name, _in_phase(observer, "optimizer", getattr(policy._optimizer, name)))


def _in_phase(observer: Observer, name: str, function: Callable) -> Callable:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with observer.memory.in_phase(name):
            return function(*args, **kwargs)

    return call
