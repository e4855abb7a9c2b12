"""The record of one prompt with one response, as the trainer packs it into rows."""

from dataclasses import dataclass

import numpy as np

from minpro_megatron.records import StoredArray


@dataclass(frozen=True)
class TokenSequence:
    """One prompt with one response, and the values that the objective needs. Arrays cover the response's tokens. Of a
    token that is not trained on, log-probs and staleness may have any value, NaN included: no result depends on it."""

    prompt_ids: np.ndarray  # int32 [prompt tokens]
    response_ids: np.ndarray  # int32 [response tokens]
    loss_mask: np.ndarray  # float32 [response tokens]: 1 where the token is trained on
    behavior_log_probs: np.ndarray  # float32 [response tokens]; zeros while scoring
    rollout_log_probs: np.ndarray  # float32 [response tokens]
    advantage: float
    first_slot: int  # where the response's tokens start in the batch's flat token array
    proximal_log_probs: np.ndarray | None = None  # float32 [response tokens]; None if the loss does not use them
    reference_log_probs: np.ndarray | None = None
    staleness: np.ndarray | None = None  # int32 [response tokens], in global steps; None: 0
    # the experts that the server chose, uint8 or int16 [all tokens but the last, layers, experts per token]
    routed_experts: np.ndarray | StoredArray | None = None
    supports: np.ndarray | StoredArray | None = None  # what truncated sampling kept, as batching/supports.py has it

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def num_trained_tokens(self) -> int:
        return int(np.count_nonzero(self.loss_mask))
