"""The data that is passed between the stages: one frozen record per stage, and their binary format.

Path: Prompt -> IssuedGroup (given to the servers) -> CollectedGroup (sampled and rewarded) -> Batch (one global
step's groups, sent to the trainer) -> BehaviorLogProbs (the trainer's scores, sent back and stored).
Arrays are numpy arrays; the binary format is MessagePack.
"""

import math
from typing import Any

import msgspec
import numpy as np

NOT_GRADED = math.nan  # replaces a missing reward
# Replace the values of given tokens, which no policy has sampled.
NOT_SAMPLED = -1  # as the policy version
NO_LOG_PROB = math.nan


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """Base of the records: immutable, keyword-only."""


class Prompt(Record, frozen=True, kw_only=True):
    """A task: `text` is the question, without instruction and chat template; the reward compares with `answer`.

    `prefix` is a given beginning of the response, which the policy continues (arXiv:2601.18795). `system` is the system
    message before the question, for a chat template. `metadata` is whatever the row has there, for the reward.
    """

    id: str
    source: str
    text: str
    answer: str
    prefix: str = ""
    pass_rate: float | None = None  # fraction of right responses of some model, if known
    system: str = ""
    metadata: Any = None


class IssuedGroup(Record, frozen=True, kw_only=True):
    """A prompt with everything that determines its sampling: at most `responses_per_prompt` responses, one seed each.

    An evaluation that needs more samples of a prompt has several groups of it with the same `group_id`.
    """

    group_id: int  # counts all groups of the run in the order of issue
    batch_index: int  # the global step that consumes it; -1: not decided yet (bounded mode)
    policy_version: int  # its tokens are sampled with this version (delay mode), or a newer one (bounded mode)
    prompt: Prompt
    prompt_token_ids: np.ndarray  # int32
    sampling_seeds: list[int]
    is_evaluation: bool = False  # measured and not stored; training groups have priority


class StoredArray(Record, frozen=True, kw_only=True):
    """The location of a response's routes or supports: an array in a file that all ranks can read
    (batching/stored_arrays.py).

    A batch of long responses has tens of gigabytes of them; a rank needs only those of its own rows and layers.
    """

    path: str
    offset: int  # bytes
    shape: tuple[int, ...]
    dtype: str
    sha256: str


class Turn(Record, frozen=True, kw_only=True):
    """What happened in one turn of an episode: the policy sampled tokens, and the environment answered or ended it."""

    sampled_tokens: int
    given_tokens: int = 0  # the answer as the policy reads it, with the chat template's markers; 0: the episode ended
    tool_calls: int = 0
    seconds: float = 0.0  # until the environment had answered
    problem: str = ""  # why a tool call failed; the policy received this as text


class Response(Record, frozen=True, kw_only=True):
    """One response. `token_ids` includes the stop token if there was one.

    In an episode, given tokens (the answers of the environment) stand between the sampled ones. They have the version
    NOT_SAMPLED and the log-prob NO_LOG_PROB; the first and the last token are always sampled.
    """

    token_ids: np.ndarray  # int32 [response tokens]
    rollout_log_probs: np.ndarray  # float32 [response tokens], as SGLang reported them
    policy_versions: np.ndarray  # int32 [response tokens]: the version that sampled each token
    finish_reason: str  # "stop" or "length"
    reward: float  # NOT_GRADED: it could not be graded, and its group is excluded from training
    loss_mask: np.ndarray | None = None  # uint8 [response tokens]: 1 if sampled, 0 if given; None: all are sampled
    turns: list[Turn] = []  # of an episode
    # the experts that the server chose, uint8 or int16 [prompt + response tokens - 1, layers, experts per token]: the
    # last token was sampled but never went through the model (routing replay R3)
    routed_experts: np.ndarray | None = None
    stored_routes: StoredArray | None = None  # replaces the array once the journal has stored the routes in a file
    # the token ids that truncated sampling (sampling.top_k) could choose from, int32, in the form of
    # batching/supports.py; the rollout log-probs are then those of the softmax over them
    supports: np.ndarray | None = None
    stored_supports: StoredArray | None = None  # replaces the array as stored_routes does
    behavior_log_probs: np.ndarray | None = None  # float32 [response tokens], once the trainer has scored it

    @property
    def is_graded(self) -> bool:
        return not math.isnan(self.reward)

    @property
    def num_sampled(self) -> int:
        return len(self.token_ids) if self.loss_mask is None else int(np.count_nonzero(self.loss_mask))

    def of_sampled(self, values: np.ndarray) -> np.ndarray:
        """Those of `values`, one for each response token, that belong to sampled tokens."""
        return values if self.loss_mask is None else values[self.loss_mask != 0]

    def without_given(self, values: np.ndarray) -> np.ndarray:
        """`values`, float32 [response tokens], with NO_LOG_PROB for given tokens."""
        return values if self.loss_mask is None else np.where(self.loss_mask != 0, values, np.float32(NO_LOG_PROB))


class CollectedGroup(Record, frozen=True, kw_only=True):
    """A group whose responses are all sampled, and graded unless there is a `grading_problem`."""

    issued: IssuedGroup
    responses: list[Response]
    grading_problem: str = ""  # why a response has no reward

    @property
    def oldest_version(self) -> int:
        return min(int(one.of_sampled(one.policy_versions).min()) for one in self.responses)

    @property
    def newest_version(self) -> int:
        return max(int(one.of_sampled(one.policy_versions).max()) for one in self.responses)

    def without_metadata(self) -> "CollectedGroup":
        """The group without the row's metadata: only the reward needs it, and it may be large."""
        prompt = self.issued.prompt
        if prompt.metadata is None:
            return self
        issued = msgspec.structs.replace(self.issued, prompt=msgspec.structs.replace(prompt, metadata=None))
        return msgspec.structs.replace(self, issued=issued)

    @property
    def is_scored(self) -> bool:
        return all(response.behavior_log_probs is not None for response in self.responses)


class Batch(Record, frozen=True, kw_only=True):
    """The groups that global step `index` consumes, in canonical order (by group_id)."""

    index: int
    groups: list[CollectedGroup]


class BehaviorLogProbs(Record, frozen=True, kw_only=True):
    """The trainer's log-probs of batch `index` under its sampling weights: [group][response], float32 [tokens], with
    NO_LOG_PROB for given tokens."""

    index: int
    policy_version: int  # of the weights that computed them; -1: each token under its own version (bounded mode)
    log_probs: list[list[np.ndarray]]


class TrainedStep(Record, frozen=True, kw_only=True):
    """Global step `step`, which started with the weights of `policy_version`, has trained on its batch."""

    step: int
    policy_version: int
    # under the policy at the update that trained on the token: [group][response], float32 [tokens]; NaN for tokens
    # without an update and for given ones; empty if not recorded
    log_probs: list[list[np.ndarray]] = []


class EvaluationResult(Record, frozen=True, kw_only=True):
    """Accuracy and mean reward of one policy version: means over samples; the accuracy's standard error is over
    prompts."""

    policy_version: int
    benchmark: str = ""  # one of evaluation.benchmarks; "": the held-out prompts
    pass_at_1: float  # fraction of right responses (config.reward.is_right)
    standard_error: float
    mean_reward: float
    not_graded: int  # number of responses; they count as wrong, and in the mean reward as 0 or the lowest reward
    num_prompts: int
    samples_per_prompt: int
    mean_response_tokens: float
    wall_time_s: float


class ServerAddress(Record, frozen=True, kw_only=True):
    """A ready rollout server, as recorded in `run_dir/endpoints/server-<index>-start-<incarnation>.json`."""

    index: int
    url: str
    tensor_parallel: int
    start: int = 0  # how often this server was started before: after a restart it has the initial weights


class PublishLease(Record, frozen=True, kw_only=True):
    """The collector's permission to send `version` to `servers`, until publish_end."""

    version: int
    servers: list[ServerAddress]
    evaluations: list[EvaluationResult]  # all evaluations finished so far
    # Shared GPUs: all work of the version before is done, and the servers' memory is the trainer's until publish_end.
    releases: bool = False
    requests_in_flight: bool = False  # bounded mode: pause the servers before the transfer, continue after it
    canary_prompts: list[list[int]] = []  # token ids whose greedy continuations show that the weights have arrived
    metrics: dict[str, float] = {}  # from servers and collector since the last lease


class CollectorTotals(Record, frozen=True, kw_only=True):
    """The content of the collector's journal at the end of the run, as counts."""

    groups_issued: int
    groups_consumed: int
    groups_dropped: int
    groups_not_graded: int  # included in the dropped groups
    smallest_staleness: int
    largest_staleness: int
    versions_published: int
    evaluations: list[EvaluationResult]
    failed_evaluations: int = 0  # since the last start of the collector; a restart of the run also resets it


_DTYPES = ("<i4", "<f4", "|u1", "<i2")


def _encode_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [value.dtype.str, value.shape, value.tobytes()]
    raise TypeError(f"records cannot hold {type(value).__name__}")


def _decode_array(kind: type, value: Any) -> Any:
    if kind is np.ndarray:
        dtype, shape, data = value
        if dtype not in _DTYPES:
            raise ValueError(f"array dtype {dtype!r}: records hold int32, float32, uint8 and int16 only")
        return np.frombuffer(data, dtype=dtype).reshape(shape)
    raise TypeError(f"records cannot hold {kind.__name__}")


def encode(record: Record) -> bytes:
    """The record as MessagePack; arrays as (dtype, shape, bytes)."""
    return msgspec.msgpack.encode(record, enc_hook=_encode_array)


def decode[RecordType](kind: type[RecordType], data: bytes) -> RecordType:
    """The record of type `kind` in `data`. Raises msgspec.ValidationError if `data` is not one."""
    return msgspec.msgpack.decode(data, type=kind, dec_hook=_decode_array)
