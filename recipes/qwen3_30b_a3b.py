"""Qwen3-30B-A3B-Base: the paper's runs on eight machines of eight H100, and variants. See recipes/paper.py for files.

24 GPUs train and 40 serve. Experts are 29.0 of the 30.5 billion parameters, so they must be divided: over 8 ranks,
which are on one machine (ranks are numbered tensor x context x data, in this order), so that tokens travel to their
experts over NVLink. Attention is small (hidden size 2,048): tensor 2 is enough, and a row of 32,768 tokens is also
divided by context 2, into 8,192 tokens per rank. A rank holds 42 GB (weights 9, gradients 18, optimizer 15).

A server of two GPUs has 61 GB of weights and 79 GB of KV cache (98 kB per token: 806,000 tokens); four GPUs would
save weights, but a decoding step waits for messages between GPUs in each of 48 layers. `minpro plan` expects 710 s
per step with responses of 8,192 tokens on average, 850 s with 32 GPUs that train and 32 that serve, and 821 s with 16
and 48.
"""

from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.config.run import RunConfig
from minpro_megatron.recipes import paper


def minpro() -> RunConfig:
    """MinPRO, two global steps off-policy: the paper's main run."""
    return paper.table_3(
        "Qwen3-30B-A3B-Base",
        ParallelConfig(tensor=2, context=2, expert=8, data=6),
        paper.servers(count=20, tensor_parallel=2),
    )


def minpro_one_machine() -> RunConfig:
    """MinPRO on eight GPUs of 80 GB: four train, two servers have two each.

    A rank holds 48 GB of weights and gradients. Its 92 GB of optimizer states are in host memory, where gradients are
    also sent and the sampling weights are kept: about 630 GB, and 430 GB more while a checkpoint is written in the
    background (none with checkpoint.asynchronous=false).
    """
    mesh = ParallelConfig(tensor=2, context=2, expert=4)
    return paper.one_machine(minpro(), mesh, paper.servers(count=2, tensor_parallel=2), cpu_offload=1.0)


def minpro_one_machine_shared() -> RunConfig:
    """MinPRO on eight GPUs of 80 GB that train and serve in turns: servers of four GPUs.

    A rank would need 79 GB, and 3 GB stay the servers'; with 30 % of the optimizer's states in host memory it needs
    65 GB. Of the host's memory the trainer's states take 320 GB in the servers' turn.
    """
    mesh, servers = ParallelConfig(tensor=4, context=2, expert=8), paper.servers(count=2, tensor_parallel=4)
    return paper.one_machine_in_turns(minpro(), mesh, servers, memory_fraction=0.66, cpu_offload=0.3)


VARIANTS = paper.variants(minpro, {"cppo": ["objective.threshold=0.2"]})  # arXiv:2606.10968, section 4.1
