"""The reference engine with a fault: after its first responses it samples from other distributions than it should.

    python -m tests.e2e.hot_server --model-path HF_DIR --port 30000

Only what is sampled from all tokens is wrong, so no canary notices.
"""

import itertools
from typing import Any

from torch import Tensor

from minpro_megatron.reference_engine import responses
from minpro_megatron.reference_engine.__main__ import main
from minpro_megatron.reference_engine.sampling import Sampled, Sampler

RIGHT_RESPONSES = 40  # the first batch, which the trainer compares before it begins, is among them
TEMPERATURE = 0.4  # in the place of 1


class HotSampler(Sampler):
    _number = itertools.count()

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._is_hot = next(self._number) >= RIGHT_RESPONSES and not self._parameters.is_truncated

    def sample(self, logits_V: Tensor) -> Sampled:
        return super().sample(logits_V / TEMPERATURE if self._is_hot else logits_V)


if __name__ == "__main__":
    responses.Sampler = HotSampler
    main()
