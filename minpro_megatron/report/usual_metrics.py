"""The metrics whose curves a comparison of runs shows by default."""

USUAL_METRICS = (
    "eval/pass_at_1", "eval/mean_reward", "reward/accuracy", "reward/mean", "policy/entropy", "ratio/max", "ratio/min",
    "prefix_min/mean",
    "objective/effective_sample_size", "objective/clipped_fraction", "staleness/mean", "optimizer/grad_norm",
    "mismatch/kl_k3", "response/length_mean", "throughput/response_tokens_per_s", "time/step_s",
)  # fmt: skip
