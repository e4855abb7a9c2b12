"""The binary form of the records: what is decoded is what was encoded, and damage is refused."""

import msgspec
import numpy as np
import pytest

from minpro_megatron import records
from minpro_megatron.records import (
    Batch,
    BehaviorLogProbs,
    CollectedGroup,
    CollectorTotals,
    PublishLease,
    Response,
    ServerAddress,
    TrainedStep,
)
from tests.support.rollout_fakes import collected, issued_groups, scores_of

GROUPS = [
    collected(group, versions=[0, 1, 1], routes=[np.arange(12, dtype=dtype).reshape(3, 2, 2)] * 2)
    for group, dtype in zip(issued_groups(range(2)), (np.uint8, np.int16), strict=True)
]


def test_a_batch_with_its_arrays_comes_back_as_it_was() -> None:
    found = records.decode(Batch, records.encode(Batch(index=3, groups=GROUPS)))
    assert found.index == 3
    for group, expected in zip(found.groups, GROUPS, strict=True):
        assert group.issued.prompt_token_ids.tolist() == expected.issued.prompt_token_ids.tolist()
        assert group.issued.sampling_seeds == expected.issued.sampling_seeds
        for one, other in zip(group.responses, expected.responses, strict=True):
            for name in Response.__struct_fields__:
                value, wanted = getattr(one, name), getattr(other, name)
                if isinstance(wanted, np.ndarray):
                    assert (value.dtype, value.shape, value.tolist()) == (wanted.dtype, wanted.shape, wanted.tolist())
                else:
                    assert value == wanted


def test_no_array_and_an_empty_one_are_distinguished() -> None:
    empty = msgspec.structs.replace(GROUPS[0].responses[0], behavior_log_probs=np.zeros(0, np.float32))
    group = CollectedGroup(issued=GROUPS[0].issued, responses=[empty, GROUPS[0].responses[1]])
    one, other = records.decode(CollectedGroup, records.encode(group)).responses
    assert one.behavior_log_probs is not None
    assert one.behavior_log_probs.shape == (0,)
    assert other.behavior_log_probs is None


def test_what_is_not_a_number_travels_too() -> None:
    """NaN: no update trained on the token."""
    step = TrainedStep(step=1, policy_version=1, log_probs=[[np.asarray([-1.0, np.nan], np.float32)]])
    found = records.decode(TrainedStep, records.encode(step)).log_probs[0][0]
    assert found[0] == -1
    assert np.isnan(found[1])


def test_a_lease_has_its_defaults_and_its_values() -> None:
    server = ServerAddress(index=1, url="http://127.0.0.1:1", tensor_parallel=1)
    for lease in (
        PublishLease(version=2, servers=[server], evaluations=[]),
        PublishLease(
            version=2,
            servers=[],
            evaluations=[],
            requests_in_flight=True,
            canary_prompts=[[1, 2]],
            metrics={"a/b": 0.5},
        ),
    ):
        assert records.decode(PublishLease, records.encode(lease)) == lease


def test_a_group_knows_its_versions_and_whether_it_is_scored() -> None:
    group = collected(issued_groups([0])[0], versions=[2, 5, 3])
    assert (group.oldest_version, group.newest_version, group.is_scored) == (2, 5, False)
    responses = [msgspec.structs.replace(r, behavior_log_probs=r.rollout_log_probs) for r in group.responses]
    assert not CollectedGroup(issued=group.issued, responses=[responses[0], group.responses[1]]).is_scored
    assert CollectedGroup(issued=group.issued, responses=responses).is_scored


def replaced(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data
    return data.replace(old, new)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[:-1], "truncated"),
        (lambda data: b"\xc1" + data, "invalid opcode|Expected"),
        (lambda data: replaced(data, b"\xa3<f4", b"\xa3<f8"), "dtype '<f8': records hold int32, float32"),
        (lambda data: replaced(data, b"\xa3<f4", b"\xa3|O8"), "dtype '|O8'"),
        (lambda data: replaced(data, b"\x91\x03", b"\x91\x07"), "cannot reshape"),
        (lambda data: replaced(data, b"\xa5index", b"\xa5indey"), "missing required field `index`"),
    ],
)
def test_damaged_bytes_are_refused(damage, reason: str) -> None:
    data = records.encode(scores_of(Batch(index=0, groups=GROUPS)))
    with pytest.raises((msgspec.DecodeError, ValueError), match=reason):
        records.decode(BehaviorLogProbs, damage(data))


def test_another_record_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="missing required field"):
        records.decode(CollectorTotals, records.encode(Batch(index=0, groups=[])))


def test_what_no_record_can_hold_is_named() -> None:
    with pytest.raises(TypeError, match="records cannot hold complex"):
        records.encode(TrainedStep(step=1j, policy_version=0))  # type: ignore[arg-type]
