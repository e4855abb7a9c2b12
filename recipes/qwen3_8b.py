"""Qwen3-8B-Base: the paper's runs on four machines of eight H100, and variants. See recipes/paper.py for files.

8 GPUs train and 24 serve: a token costs a server more time than the trainer, and `minpro plan` expects 1,060 s per
step with this split, 1,500 s with equal halves (responses of 8,192 tokens on average). Tensor 2 and context 2 divide a
row of 32,768 tokens into 8,192 tokens per rank. A rank holds 37 GB (weights 8, gradients 16, optimizer 12), which
leaves more room than pipeline stages would, without their idle time. Each of the other GPUs is a server: 16 GB of
weights, 54 GB of KV cache (147 kB per token: 365,000 tokens), and no messages between GPUs.
"""

from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.config.run import RunConfig
from minpro_megatron.recipes import paper


def minpro() -> RunConfig:
    """MinPRO, two global steps off-policy: the paper's main run."""
    return paper.table_3(
        "Qwen3-8B-Base",
        ParallelConfig(tensor=2, context=2, data=2),
        paper.servers(count=24, tensor_parallel=1),
    )


def minpro_one_machine() -> RunConfig:
    """MinPRO on eight GPUs of 80 GB: two train, six are servers.

    A rank would need 74 GB; with all of the optimizer's states in host memory (49 GB per rank) it needs 25 GB. With
    four GPUs that train and four servers no host memory would be needed, but a third more time.
    """
    mesh = ParallelConfig(tensor=2, data=1)
    return paper.one_machine(minpro(), mesh, paper.servers(count=6, tensor_parallel=1), cpu_offload=1.0)


def minpro_one_machine_shared() -> RunConfig:
    """MinPRO on eight GPUs of 80 GB that train and serve in turns: servers of two GPUs."""
    mesh = ParallelConfig(tensor=2, context=2, data=2)
    return paper.one_machine_in_turns(minpro(), mesh, paper.servers(count=4, tensor_parallel=2), memory_fraction=0.66)


VARIANTS = paper.variants(minpro)
