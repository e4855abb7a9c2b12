"""Qwen3-8B-Base: the paper's runs on four machines of eight H100, and variants. See recipes/paper.py for files.

8 GPUs train and 24 serve: a token costs a server more time than the trainer, and tools/plan_run.py expects 1,360 s a
step of this, 1,720 s of halves (responses of 8,192 tokens on average). Tensor 2 and context 2 cut a row of 32,768
tokens to 8,192 tokens a rank; a rank holds 37 GB (weights 8, gradients 16, optimizer 12), which leaves room for more
than pipeline stages would give, and has none of their idle time. Every GPU of the others is a server: 16 GB of weights,
57 GB of KV cache (147 kB a token: 390,000 tokens), and no messages between GPUs.
"""

from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.config.run import RunConfig
from recipes import paper


def minpro() -> RunConfig:
    """MinPRO, two global steps off-policy: the paper's main run."""
    return paper.table_3(
        "Qwen3-8B-Base",
        ParallelConfig(tensor=2, context=2, data=2),
        paper.servers(count=24, tensor_parallel=1),
    )


def minpro_one_machine() -> RunConfig:
    """MinPRO on eight GPUs of 80 GB: two train, six are servers.

    A rank would hold 74 GB; with all of the optimizer's states in host memory (49 GB a rank) it holds 25 GB. Four that
    train and four servers would need none there, and a third more time.
    """
    mesh = ParallelConfig(tensor=2, data=1)
    return paper.one_machine(minpro(), mesh, paper.servers(count=6, tensor_parallel=1), cpu_offload=1.0)


VARIANTS = paper.variants(minpro)
