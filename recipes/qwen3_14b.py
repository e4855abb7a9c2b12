"""Qwen3-14B-Base: the paper's runs on four machines of eight H100, and variants. See recipes/paper.py for files.

The paper gives this model half the batch (256 prompts, 16 an update) and 160 global steps. 16 GPUs train and 16 serve.
Tensor 4 and context 2 are the eight GPUs of a machine: 4,096 tokens of a row of 32,768 and 33 GB a rank (weights 7,
gradients 15, optimizer 11); tensor 2 would make it 55 GB. A server of two GPUs has 30 GB of weights and some 110 GB of
KV cache (164 kB a token: 680,000 tokens), of one GPU a third of that.
"""

from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.config.run import RunConfig
from recipes import paper


def minpro() -> RunConfig:
    """MinPRO, two global steps off-policy: the paper's main run."""
    return paper.table_3(
        "Qwen3-14B-Base",
        ParallelConfig(tensor=4, context=2, data=2),
        paper.servers(count=8, tensor_parallel=2),
        num_global_steps=160,
        num_prompts=256,
        mini_batch_prompts=16,
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
    """MinPRO on eight GPUs of 80 GB: four train, two servers have two each.

    A rank would hold 66 GB; with all of the optimizer's states in host memory (44 GB a rank) it holds 22 GB.
    """
    mesh = ParallelConfig(tensor=4, data=1)
    return paper.one_machine(minpro(), mesh, paper.servers(count=2, tensor_parallel=2), cpu_offload=1.0)
