"""Weights & Biases beside TensorBoard."""

from pydantic import Field

from minpro_megatron.config.base import Section


class WandbConfig(Section):
    """Weights & Biases beside TensorBoard: settings, metrics and histograms are sent, prompts and responses are not. It
    needs the optional dependency `wandb`. The environment variables of W&B apply, such as WANDB_API_KEY and
    WANDB_MODE=offline."""

    enabled: bool = Field(default=False, description="Write to Weights & Biases too.")
    project: str = Field(default="minpro-megatron", min_length=1, description="Project that contains the W&B run.")
    entity: str | None = Field(
        default=None, description="User or team of the project; null uses the account's default."
    )
