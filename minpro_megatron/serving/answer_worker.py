"""The process that checks large answers: `python -m minpro_megatron.serving.answer_worker`.

The first message on standard input has the facts of the model (`encode_facts`). Each further one is a `Job` and, as a
message of its own, the body of a server's answer. For each job the process writes one message to standard output:
the sequences, or the reason why the answer is refused (`decode_result`). The process ends when its input ends.
"""

import signal
import sys
from collections.abc import Sequence
from typing import BinaryIO

import msgspec
import numpy as np

from minpro_megatron.models.model_files import ModelFacts
from minpro_megatron.pipe_messages import output_for_messages, read_message, write_message
from minpro_megatron.serving.answers import AnswerChecker, SampledSequence, SentRequest
from minpro_megatron.serving.errors import InvalidAnswer, WrongPolicyVersion


class Job(msgspec.Struct, frozen=True, array_like=True):
    """The answer of one server to `requests`; `exact_versions` is AnswerChecker's."""

    server: str
    exact_versions: bool
    requests: Sequence[SentRequest]


class _Array(msgspec.Struct, array_like=True):
    dtype: str
    shape: tuple[int, ...]
    data: memoryview  # of the message, because it may have hundreds of megabytes


class _Sequence(msgspec.Struct, array_like=True):
    token_ids: bytes
    log_probs: bytes
    policy_versions: bytes
    finish_reason: str
    routes: _Array | None
    supports: _Array | None


class _Refusal(msgspec.Struct, frozen=True, array_like=True):
    wrong_version: bool
    server: str
    request_id: str
    field: str
    problem: str


class _Result(msgspec.Struct, frozen=True, array_like=True):
    sequences: list[_Sequence]
    refusal: _Refusal | None = None


_JOB_DECODER = msgspec.msgpack.Decoder(Job)
_RESULT_DECODER = msgspec.msgpack.Decoder(_Result)
_FACTS_DECODER = msgspec.msgpack.Decoder(ModelFacts)


def encode_facts(facts: ModelFacts) -> bytes:
    return msgspec.msgpack.encode(facts)


def decode_result(message: bytes | bytearray) -> list[SampledSequence]:
    """The sequences in a result. Raises the InvalidAnswer or WrongPolicyVersion that the check has raised."""
    result = _RESULT_DECODER.decode(message)
    if result.refusal is not None:
        found = result.refusal
        kind = WrongPolicyVersion if found.wrong_version else InvalidAnswer
        raise kind(found.server, found.request_id, found.field, found.problem)
    return [
        SampledSequence(
            np.frombuffer(one.token_ids, np.int32),
            np.frombuffer(one.log_probs, np.float32),
            np.frombuffer(one.policy_versions, np.int32),
            one.finish_reason,
            _decoded(one.routes),
            _decoded(one.supports),
        )
        for one in result.sequences
    ]


def checked(job: Job, body: bytearray, facts: ModelFacts) -> bytes:
    """The result of a job, as a message."""
    try:
        found = AnswerChecker(job.server, facts, job.exact_versions).check(body, job.requests)
    except InvalidAnswer as error:
        wrong_version = isinstance(error, WrongPolicyVersion)
        refusal = _Refusal(wrong_version, error.server, error.request_id, error.field, error.problem)
        return msgspec.msgpack.encode(_Result([], refusal))
    return msgspec.msgpack.encode(_Result([_encodable(sequence) for sequence in found]))


def _encodable(sequence: SampledSequence) -> _Sequence:
    return _Sequence(
        sequence.token_ids.tobytes(),
        sequence.log_probs.tobytes(),
        sequence.policy_versions.tobytes(),
        sequence.finish_reason,
        _encodable_array(sequence.routed_experts),
        _encodable_array(sequence.supports),
    )


def _encodable_array(array: np.ndarray | None) -> _Array | None:
    return None if array is None else _Array(array.dtype.str, array.shape, memoryview(array).cast("B"))


def _decoded(array: _Array | None) -> np.ndarray | None:
    return None if array is None else np.frombuffer(array.data, array.dtype).reshape(array.shape)


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Answers the jobs from `source` until it ends."""
    if (first := read_message(source)) is None:
        return
    facts = _FACTS_DECODER.decode(first)
    while (job := read_message(source)) is not None and (body := read_message(source)) is not None:
        write_message(sink, checked(_JOB_DECODER.decode(job), body, facts))


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches the collector, which ends this process's input
    serve(sys.stdin.buffer, output_for_messages())


if __name__ == "__main__":
    main()
