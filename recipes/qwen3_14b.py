"""Qwen3-14B-Base: the paper's runs on four machines of eight H100, and variants. See recipes/paper.py for files.

`ctpo_tool` is a run of another paper, with the model that was released beside the base model.

The paper gives this model half the batch (256 prompts, 16 per update) and 160 global steps. 16 GPUs train and 16 serve.
Tensor 4 and context 2 use the eight GPUs of a machine: 4,096 tokens of a row of 32,768 and 33 GB per rank (weights 7,
gradients 15, optimizer 11); tensor 2 would need 55 GB. A server of two GPUs has 30 GB of weights and 111 GB of KV
cache (164 kB per token: 676,000 tokens), a server of one GPU a third of that.
"""

from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.config.run import RunConfig, with_overrides
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


def minpro_one_machine_shared() -> RunConfig:
    """MinPRO on eight GPUs of 80 GB that train and serve in turns: servers of four GPUs."""
    mesh = ParallelConfig(tensor=4, data=2)
    return paper.one_machine_in_turns(minpro(), mesh, paper.servers(count=2, tensor_parallel=4), memory_fraction=0.66)


# The tool says nothing about itself: the prompt does.
TOOL_INSTRUCTION = (
    "Solve the following math problem step by step. You can run Python code: write a block that begins with ```python "
    "and ends with ```, and end your turn. You then read what the code prints. Every block is a new program, so repeat "
    "what it needs, and print what you want to know. Put your final answer within \\boxed{}.\n\n{question}"
)


def ctpo_tool() -> RunConfig:
    """CTPO on-policy with the Python tool, five turns: the settings of its authors' script (arXiv:2605.07331).

    From the script (ctpo.sh of horizon-llm/CTPO): model, batch, limits of tokens and turns, learning rate, weight
    decay, clipping, the importance weight of whole sequences, and no thinking. Here the prompts are DAPO's (the
    script's default is DeepScaleR), and the wording of the instruction is this project's own.
    """
    base = paper.table_3(
        "Qwen3-14B",
        ParallelConfig(tensor=4, context=2, data=2),
        paper.servers(count=8, tensor_parallel=2),
        num_global_steps=305,
    )
    with_text = base.data.model_copy(
        update={
            "instruction": TOOL_INSTRUCTION,
            "chat_template": True,
            "chat_template_arguments": {"enable_thinking": False},
        }
    )
    return with_overrides(
        base.model_copy(update={"data": with_text}),
        [
            "name=qwen3-14b-ctpo-tool",
            "objective.name=ctpo",
            "objective.aggregation=token_mean",
            "objective.log_clamp=10",
            "loss.sequence_importance.enabled=true",
            "loss.sequence_importance.cap=5",
            "optimizer.warmup_global_steps=0",
            "optimizer.weight_decay=0.01",
            "staleness.delay_steps=0",
            "sampling.max_prompt_tokens=16000",
            "sampling.max_response_tokens=8000",
            "sampling.max_turns=5",
            "environment.name=python_tool",
            "environment.python_tool.timeout_s=30",
            "environment.python_tool.memory_mb=2048",
            "evaluation.temperature=0.7",
            "evaluation.top_p=1",
            "evaluation.every_steps=20",
        ],
    )


VARIANTS = paper.variants(minpro)
