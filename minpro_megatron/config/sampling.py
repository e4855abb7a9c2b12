"""How responses are sampled."""

from pydantic import Field

from minpro_megatron.config.base import Section


class SamplingConfig(Section):
    """How training responses are sampled. Top-p and top-k are deliberately missing: the trainer's log-probs are those
    of the untruncated distribution, so truncated sampling would make every ratio wrong."""

    temperature: float = Field(
        default=1.0, gt=0, description="Sampling temperature of training responses; log-probs use it too."
    )
    max_prompt_tokens: int = Field(default=2048, ge=1, description="Maximum length of a prompt in tokens.")
    max_response_tokens: int = Field(
        default=20480,
        ge=1,
        description="Maximum length of a response in tokens, including the answers of an environment; longer ones are "
        "truncated.",
    )
    max_turns: int = Field(
        default=1,
        ge=1,
        description="Maximum number of turns that the policy has in a response. More than one needs an environment "
        "(environment.name), which answers between them.",
    )
    extra_stop_tokens: list[str] = Field(
        default=[],
        description="Special tokens that end a response in addition to those of the model's config. A base model with "
        "a chat template ends its turn with <|im_end|>, for example, which its config does not list.",
    )
