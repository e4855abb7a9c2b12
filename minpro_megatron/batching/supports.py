"""The supports of truncated sampling: which token ids could be sampled at each place of a response.

With sampling.top_k a server samples from a few kept ids and reports them. The policy is then the softmax over them, for
the old and the new weights alike, so that ratios compare probabilities of the same choice (support replay; the "Keep
Sampling Mask" of DeepSeek-V3.2, arXiv:2512.02556). A response's supports are one int32 array: first the number of kept
ids of each token, 0 for given tokens, then the ids of all tokens one after the other.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from minpro_megatron.batching.row_shard import RowShard
from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.errors import UserError


def largest_support(top_k: int) -> int:
    """The maximum number of kept ids of a token. Tokens as likely as the last kept one are kept too: logits of bfloat16
    have many equal values."""
    return 4 * top_k + 64


def support_array(sizes: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The supports with `sizes`, [tokens], and `ids`, [sum of the sizes], as one array, int32."""
    return np.concatenate([sizes, ids]).astype(np.int32)


def sizes_and_ids(supports: np.ndarray, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """The parts of the supports of `num_tokens` tokens. Raises ValueError if they are not of so many tokens."""
    sizes, ids = supports[:num_tokens], supports[num_tokens:]
    if len(sizes) != num_tokens or sizes.min(initial=0) < 0 or int(sizes.sum(dtype=np.int64)) != len(ids):
        raise UserError(f"the kept ids of a response of {num_tokens} tokens are those of another one")
    return sizes, ids


def joined_supports(parts: Sequence[tuple[int, np.ndarray | None]]) -> np.ndarray | None:
    """The supports of the parts of a response, each as (tokens, supports); None if no part has any. A part without any
    is given: it keeps no ids."""
    if all(supports is None for _, supports in parts):
        return None
    split = [
        (np.zeros(num_tokens, np.int32), np.empty(0, np.int32))
        if supports is None
        else sizes_and_ids(supports, num_tokens)
        for num_tokens, supports in parts
    ]
    return support_array(np.concatenate([sizes for sizes, _ in split]), np.concatenate([ids for _, ids in split]))


def refuse_missing_supports(sequences: Sequence[TokenSequence], top_k: int) -> None:
    """Raises ValueError if a response has no supports."""
    missing = sum(sequence.supports is None for sequence in sequences)
    if missing:
        raise UserError(
            f"sampling.top_k = {top_k}: {missing} of {len(sequences)} responses have no kept ids: they were sampled "
            "without sampling.top_k, or their kept ids have been removed (collector.journal_keep_routes=false)"
        )


class RowSupports(NamedTuple):
    """The supports of the labels of a context shard's slots."""

    sizes_S: np.ndarray  # int32: the number of kept ids of each slot
    ids: np.ndarray  # int32: the kept ids of all slots in their order


def shard_supports(row: RowShard) -> RowSupports:
    """The supports of the row's slots. Those in files must have been read. Raises ValueError if an array is not that of
    its response."""
    sizes_S = np.zeros(len(row.response_index_S), np.int32)
    ids = []
    for place, supports in enumerate(row.supports):
        assert isinstance(supports, np.ndarray), "a sequence without supports, or with supports that were not read"
        first, end = np.searchsorted(row.sequence_S, [place, place + 1])  # a rank's slots are ordered by sequence
        slots = first + np.flatnonzero(row.response_index_S[first:end] >= 0)
        sizes, all_ids = sizes_and_ids(supports, row.response_lengths[place])
        index = row.response_index_S[slots]
        sizes_S[slots] = sizes[index]
        ids.append(_of_tokens(all_ids, sizes, index))
    return RowSupports(sizes_S, np.concatenate(ids) if ids else np.empty(0, np.int32))


def _of_tokens(ids: np.ndarray, sizes: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The ids of the tokens `index`, one after the other."""
    starts = np.cumsum(sizes, dtype=np.int64) - sizes
    counts = sizes[index].astype(np.int64)
    before = np.cumsum(counts) - counts
    return ids[np.repeat(starts[index] - before, counts) + np.arange(counts.sum())]


def support_problem(supports: RowSupports, row: RowShard, vocab_size: int) -> str | None:
    """The error in the supports of the row's slots, or None: each trained token must keep ids, and any token that does
    its own among them. The log-prob of a label outside its softmax is NaN, and so is 0 times its gradient."""
    sizes_S, ids = supports
    if ids.min(initial=0) < 0 or ids.max(initial=0) >= vocab_size:
        return f"a kept id is outside the vocabulary of {vocab_size}"
    has_label = np.zeros(len(sizes_S), bool)
    slots = np.repeat(np.arange(len(sizes_S)), sizes_S)
    has_label[slots[ids == row.label_ids_S[slots]]] = True
    if not has_label[row.is_trained_S | (sizes_S > 0)].all():
        return "a sampled token is not among its kept ids"
    return None
