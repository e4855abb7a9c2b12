"""The process of a reference engine gives the memory of its weights back to the machine."""

from dataclasses import replace

import psutil
import torch

from minpro_megatron.reference_engine.model import Model
from tests.support.reference_models import architecture


def resident_bytes() -> int:
    return psutil.Process().memory_info().rss


def test_released_weights_leave_the_processs_memory_and_come_back() -> None:
    model = Model(replace(architecture(), vocab_size=32_000, hidden_size=512), 8)
    for weight in model.weights.values():
        torch.nn.init.ones_(weight)
    num_bytes = sum(weight.nbytes for weight in model.weights.values())
    assert num_bytes > 100 << 20
    for _ in range(2):
        before = resident_bytes()
        model.release()
        released = resident_bytes()
        model.resume()
        assert before - released > 0.95 * num_bytes
        assert resident_bytes() - released > 0.95 * num_bytes
        assert all(weight.isnan().all() for weight in model.weights.values())
