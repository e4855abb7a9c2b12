"""Training throughput per GPU, also as a share of the GPU's peak."""

from collections.abc import Callable
from dataclasses import dataclass

from minpro_megatron.records import Batch


@dataclass(frozen=True)
class TrainerCompute:
    """The trainer's ranks, one GPU each (or one process on the CPU)."""

    training_flops: Callable[[int], float]  # of forward and backward passes of a sequence with this number of tokens
    num_ranks: int
    peak_flops: float | None  # per second, of a rank's device; None: not known

    def rates(self, batch: Batch, train_s: float) -> dict[str, float]:
        """The metrics of a batch whose updates took `train_s`. Scoring passes and recomputed activations
        count in the time and not in the operations, as usual for model FLOPs."""
        prompts = [len(group.issued.prompt_token_ids) for group in batch.groups for _ in group.responses]
        responses = [len(response.token_ids) for group in batch.groups for response in group.responses]
        lengths = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        flops_per_s = sum(self.training_flops(length) for length in lengths) / train_s / self.num_ranks
        rates = {
            "throughput/trained_tokens_per_s_per_gpu": sum(lengths) / train_s / self.num_ranks,
            "throughput/tflops_per_gpu": flops_per_s / 1e12,
        }
        if self.peak_flops is not None:
            rates["throughput/mfu"] = flops_per_s / self.peak_flops
        return rates
