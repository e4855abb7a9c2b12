"""Qwen3-14B-Base: the paper's runs on four machines of eight H100, and variants. See recipes/paper.py for files.

The paper gives this model half the batch (256 prompts, 16 per update) and 160 global steps. 16 GPUs train and 16 serve.
Tensor 4 and context 2 use the eight GPUs of a machine: 4,096 tokens of a row of 32,768 and 33 GB per rank (weights 7,
gradients 15, optimizer 11); tensor 2 would need 55 GB. A server of two GPUs has 30 GB of weights and 118 GB of KV
cache (164 kB per token: 720,000 tokens), a server of one GPU a third of that.
"""

from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.config.run import RunConfig
from minpro_megatron.recipes import paper


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


def minpro_one_machine() -> RunConfig:
    """MinPRO on eight GPUs of 80 GB: four train, two servers have two each.

    A rank would need 66 GB; with all of the optimizer's states in host memory (44 GB per rank) it needs 22 GB.
    """
    mesh = ParallelConfig(tensor=4, data=1)
    return paper.one_machine(minpro(), mesh, paper.servers(count=2, tensor_parallel=2), cpu_offload=1.0)


VARIANTS = paper.variants(minpro)
