"""How responses are sampled."""

from pydantic import Field, model_validator

from minpro_megatron.config.base import Section

MAX_TOP_K = 4096  # SGLang's own limit of reported tokens, unless it is started with --sampling-mask-max-tokens


class SamplingConfig(Section):
    """How training responses are sampled. With truncated sampling (top_k) the policy is the softmax over the token ids
    that the server kept, for the trainer too (support replay): otherwise every ratio would be wrong."""

    temperature: float = Field(
        default=1.0, gt=0, description="Sampling temperature of training responses; log-probs use it too."
    )
    top_k: int = Field(
        default=0,
        ge=0,
        le=MAX_TOP_K,
        description="Sample only from this number of likeliest tokens, 2 to 4096; 0 means no limit. The servers report "
        "which tokens they kept at each place, and the trainer computes its log-probs among these (support replay).",
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Sample only from the likeliest tokens whose probabilities together reach this share; 1 means no "
        "limit. Below 1 it needs top_k, because SGLang reports the kept tokens only with it.",
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

    @model_validator(mode="after")
    def _supports_are_reported(self) -> "SamplingConfig":
        if self.top_k == 1:
            raise ValueError(
                "top_k = 1 leaves no choice: every ratio would be 1 and every gradient 0; set it to 2 to "
                f"{MAX_TOP_K}, or to 0 for no limit"
            )
        if self.top_p < 1 and not self.top_k:
            raise ValueError(
                f"top_p = {self.top_p:g} needs top_k: SGLang reports the tokens that it kept only with a top_k of 2 to "
                f"{MAX_TOP_K}, and without them every ratio would be wrong; set top_k too, or top_p to 1"
            )
        return self
