"""What a global step and an optimizer update consist of."""

from pydantic import Field

from minpro_megatron.config.base import Section


class BatchConfig(Section):
    """The batch of a global step and how it is distributed to the ranks."""

    num_prompts: int = Field(default=512, ge=1, description="Number of prompts per global step.")
    responses_per_prompt: int = Field(
        default=8,
        ge=1,
        description="Number of responses per prompt: the prompt group within which advantages are computed. At least "
        "2; 1 with data.demonstrations.",
    )
    mini_batch_prompts: int = Field(default=32, ge=1, description="Number of prompts per optimizer update.")
    max_tokens_per_row: int = Field(
        default=32768,
        ge=1,
        description="Maximum length of a packed row in tokens, prompts and padding included; it bounds the memory of "
        "activations.",
    )
    dynamic_sampling: bool = Field(
        default=False,
        description="Groups whose rewards are all equal are dropped, and other prompts are sampled in their place.",
    )
    over_sampling: float = Field(
        default=1.0,
        ge=1,
        le=10,
        description="With staleness.mode = delay, and dynamic_sampling or data.filter: number of groups that are "
        "sampled for each group that the batch still needs.",
    )
    packing: bool = Field(
        default=True,
        description="Several sequences are packed into a row (thd); off: every row is one padded sequence.",
    )

    @property
    def updates_per_step(self) -> int:
        return self.num_prompts // self.mini_batch_prompts
