"""The share of memory that SGLang chooses for weights and KV cache."""

import pytest

from minpro_megatron.config.server import ServerConfig
from minpro_megatron.planning.server_share import MIB, static_share

H100_MIB, H200_MIB, A100_40_MIB, B200_MIB = 81_559, 143_771, 40_960, 183_359  # as nvidia-smi reports them


@pytest.mark.parametrize(
    ("memory_mib", "settings", "share"),
    [
        (H100_MIB, {}, 0.83),
        (H100_MIB, {"tensor_parallel": 2}, 0.828),
        (H100_MIB, {"tensor_parallel": 4}, 0.825),
        (H100_MIB, {"max_running_requests": 64}, 0.834),
        (H100_MIB, {"arguments": {"chunked_prefill_size": 2048}}, 0.874),  # at least 10 GB are reserved
        (H200_MIB, {"tensor_parallel": 8}, 0.897),
        (A100_40_MIB, {}, 0.823),
        (B200_MIB, {}, 0.856),
    ],
)
def test_share_of_weights_and_kv_cache(memory_mib: int, settings: dict, share: float) -> None:
    assert static_share(ServerConfig(**settings), memory_mib * MIB) == share
