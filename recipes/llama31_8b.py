"""Llama-3.1-8B-Instruct with PrefixRL (arXiv:2601.18795) on four machines of eight H100.

From the paper: the model, prompts of which three quarters include a prefix of a correct response (`minpro prefixes`
cuts it at 40 to 80 % of its tokens), responses of the current policy only, and REINFORCE with the advantage R - mean,
without a division by the standard deviation. An update takes the whole batch, so that every ratio is 1 and MinPRO's
weight too: the gradient is that of REINFORCE. Learning rate, batch and limits of tokens are those of recipes/paper.py,
because this project has not found the paper's own. recipes/paper.py says which files a launch needs.

8 GPUs train and 24 serve, as for Qwen3-8B: tensor 2 and context 2 divide a row of 32,768 tokens into 8,192 tokens per
rank. A rank holds 36 GB (weights 8, gradients 16, optimizer 12). A server has 16 GB of weights and, for each token,
131 kB of KV cache.
"""

from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.recipes import paper

MODEL = "Llama-3.1-8B-Instruct"


def prefix_rl() -> RunConfig:
    """PrefixRL: on-policy REINFORCE on hard prompts, three quarters of which include a part of a correct response."""
    base = paper.table_3(
        MODEL,
        ParallelConfig(tensor=2, context=2, data=2),
        paper.servers(count=24, tensor_parallel=1),
        mini_batch_prompts=512,
    )
    prefixed = paper.prefix_rl(base)
    return with_overrides(
        prefixed,
        [
            "name=llama-3.1-8b-prefix-rl",
            "data.chat_template=true",
            "loss.advantage=group_mean",
            "staleness.delay_steps=0",
        ],
    )


def plain_rl() -> RunConfig:
    """The same run on the same problems without prefixes, to compare."""
    prefixed = prefix_rl()
    plain = prefixed.data.train_file.removesuffix("_prefixed.jsonl") + "_plain.jsonl"
    return with_overrides(prefixed, ["name=llama-3.1-8b-plain-rl", f"data.train_file={plain}"])
