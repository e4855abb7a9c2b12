"""Qwen3-8B-Base: the paper's runs on four machines of eight H100, and variants. See recipes/paper.py for files.

8 GPUs train and 24 serve: a token costs a server more time than the trainer, and tools/plan_run.py expects 1,350 s a
step of this, 1,730 s of halves (responses of 8,192 tokens on average). Tensor 2 and context 2 cut a row of 32,768
tokens to 8,192 tokens a rank; a rank holds 37 GB (weights 8, gradients 16, optimizer 12), which leaves room for more
than pipeline stages would give, and has none of their idle time. Every GPU of the others is a server: 16 GB of weights,
some 55 GB of KV cache (147 kB a token: 370,000 tokens), and no messages between GPUs.
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


def minpro_on_policy() -> RunConfig:
    """MinPRO on-policy."""
    return paper.on_policy(minpro())


def cispo() -> RunConfig:
    """CISPO, two global steps off-policy."""
    return paper.with_objective(minpro(), "cispo")


def cispo_on_policy() -> RunConfig:
    """CISPO on-policy."""
    return paper.on_policy(cispo())


def grpo() -> RunConfig:
    """GRPO with DAPO's clip, two global steps off-policy."""
    return paper.with_objective(minpro(), "grpo")


def grpo_on_policy() -> RunConfig:
    """GRPO with DAPO's clip on-policy."""
    return paper.on_policy(grpo())


def gspo() -> RunConfig:
    """GSPO, two global steps off-policy."""
    return paper.with_objective(minpro(), "gspo")


def gspo_on_policy() -> RunConfig:
    """GSPO on-policy."""
    return paper.on_policy(gspo())


def m2po() -> RunConfig:
    """M2PO, two global steps off-policy."""
    return paper.with_objective(minpro(), "m2po")


def m2po_on_policy() -> RunConfig:
    """M2PO on-policy."""
    return paper.on_policy(m2po())


def ctpo() -> RunConfig:
    """CTPO (arXiv:2605.07331), which the paper does not have, two global steps off-policy."""
    return paper.with_objective(minpro(), "ctpo")


def ctpo_on_policy() -> RunConfig:
    """CTPO on-policy."""
    return paper.on_policy(ctpo())


def minpro_bounded() -> RunConfig:
    """MinPRO with servers that never wait: no token older than two versions."""
    return paper.bounded(minpro())


def cispo_bounded() -> RunConfig:
    """CISPO with servers that never wait: no token older than two versions."""
    return paper.bounded(cispo())


def minpro_long_context() -> RunConfig:
    """MinPRO with responses of up to 30,712 tokens: all of the model's positions."""
    return paper.long_context(minpro())


def minpro_prefix_rl() -> RunConfig:
    """MinPRO on prompts that go on with a part of a right response (PrefixRL)."""
    return paper.prefix_rl(minpro())


def minpro_one_machine() -> RunConfig:
    """MinPRO on eight GPUs of 80 GB: two train, six are servers.

    A rank would hold 74 GB; with all of the optimizer's states in host memory (49 GB a rank) it holds 25 GB. Four that
    train and four servers would need none there, and a third more time.
    """
    mesh = ParallelConfig(tensor=2, data=1)
    return paper.one_machine(minpro(), mesh, paper.servers(count=6, tensor_parallel=1), cpu_offload=1.0)
