"""The number of floating-point operations of a model's forward pass, and the peak rate of a GPU."""

import re

from minpro_megatron.batching.packing import SequenceCost
from minpro_megatron.models.architecture import Architecture

# Dense bfloat16 tensor-core operations per second, by words of the name that CUDA gives the GPU; the first match
# counts. From NVIDIA's data sheets, whose bold figures are twice as large where they assume structured sparsity.
PEAK_BFLOAT16_FLOPS = {
    "GB300": 2.5e15,  # GB300 NVL72: 180 PFLOPS dense for 72
    "B300": 2.25e15,  # HGX B300: 18 PFLOPS dense for 8
    "GB200": 2.5e15,  # GB200 NVL72: 180 PFLOPS dense for 72
    "B200": 2.25e15,  # HGX B200: 18 PFLOPS dense for 8
    "GH200": 989.4e12,  # the H100 of the GH200 data sheet
    "H200 NVL": 835.5e12,  # H200 data sheet: 1,671 sparse
    "H200": 989.4e12,  # H200 data sheet: 1,979 sparse
    "H100 NVL": 835.5e12,  # H100 data sheet: 1,671 sparse
    "H100 PCIe": 756e12,  # H100 data sheet: 1,513 sparse
    "H100": 989.4e12,  # SXM; H100 data sheet: 1,979 sparse
    "H800": 989.4e12,  # the H100's, with fewer links
    "H20": 148e12,  # H20 data sheet
    "A100": 312e12,  # A100 data sheet
    "A800": 312e12,  # the A100's, with fewer links
    "L40S": 362e12,  # L40S data sheet: 733 sparse
    "L40": 181e12,  # L40 data sheet: 362 sparse
    "A40": 149.7e12,  # A40 data sheet
    "L4": 121e12,  # L4 data sheet: 242 sparse
}


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Peak operations per second of a GPU of that name (torch.cuda.get_device_name); None if they are not known or the
    model is not bfloat16."""
    if dtype != "bfloat16":
        return None
    return next((peak for name, peak in PEAK_BFLOAT16_FLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)


def forward_flops(architecture: Architecture) -> SequenceCost:
    """Floating-point operations of forward for one sequence (a multiplication and an addition count as two); backward
    takes twice as many.

    Counts matrix products only: projections, the chosen and the shared experts or the dense layer, router, output
    layer, and the two products of causal attention, which use half of the n^2 pairs.
    """
    heads = architecture.num_attention_heads * architecture.head_dim
    groups = architecture.num_query_groups * architecture.head_dim
    hidden = architecture.hidden_size
    attention = hidden * (heads + 2 * groups) + heads * hidden
    chosen = architecture.num_experts_per_token * architecture.expert_ffn_hidden_size
    mixture = 3 * hidden * (chosen + architecture.shared_ffn_hidden_size) + hidden * architecture.num_experts
    dense = 3 * hidden * architecture.ffn_hidden_size
    mixtures = architecture.expert_layers
    feed_forward = mixtures * mixture + (architecture.num_layers - mixtures) * dense
    weights = architecture.num_layers * attention + feed_forward + hidden * architecture.vocab_size
    return SequenceCost(linear=2.0 * weights, quadratic=2.0 * architecture.num_layers * heads)


def training_flops(architecture: Architecture, num_tokens: int) -> float:
    """Operations of forward and backward of one sequence: backward has two products for each product of forward."""
    return 3 * forward_flops(architecture).of(num_tokens)
