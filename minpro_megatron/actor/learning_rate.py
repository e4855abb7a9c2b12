"""The learning rate of an update: pure functions, so that a resumed run continues exactly where it was."""

import math

from minpro_megatron.config.optimizer import OptimizerConfig


def learning_rate_at(config: OptimizerConfig, step: int) -> float:
    """The learning rate of global step `step`, from 0.

    It grows linearly over the warm-up, then is constant or decays to min_learning_rate, which it has in step
    decay_global_steps - 1 and after it. It equals that of Megatron's OptimizerParamScheduler after step + 1 increments.

    >>> config = OptimizerConfig(
    ...     learning_rate=4.0, warmup_global_steps=2, schedule="linear", decay_global_steps=5, min_learning_rate=1.0
    ... )
    >>> [learning_rate_at(config, step) for step in range(6)]
    [2.0, 4.0, 3.0, 2.0, 1.0, 1.0]
    """
    done, warmup, end = step + 1, config.warmup_global_steps, config.decay_global_steps
    if done <= warmup:
        return config.learning_rate * (done / warmup)
    if config.schedule == "constant":
        return config.learning_rate
    assert end is not None, "the settings refuse this"
    if done >= end:
        return config.min_learning_rate
    share = (done - warmup) / (end - warmup)
    left = 1 - share if config.schedule == "linear" else (1 + math.cos(math.pi * share)) / 2
    return config.min_learning_rate + left * (config.learning_rate - config.min_learning_rate)


def effective_sample_size_factor(mean: float, square_mean: float, reference: float) -> float:
    """sqrt(min(1, rho / reference)) with rho = mean^2 / square_mean: the factor of the learning rate of
    arXiv:2602.17616, section 3.2.

    `mean` and `square_mean` are those of w and w^2, where w is the importance ratio of a whole sequence of the
    mini-batch, not clipped: rho is the effective sample size as a share of the sequences. The square root is for
    optimizers that normalize the gradient, such as AdamW. For w = (1, 1, 1, 5) and reference 1, rho is 0.5714.

    >>> round(effective_sample_size_factor(2.0, 7.0, reference=1.0), 4)
    0.7559
    """
    return math.sqrt(min(1.0, mean**2 / square_mean / reference))
