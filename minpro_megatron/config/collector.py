"""The collector: its HTTP interface, and what the journal keeps."""

from typing import ClassVar

from pydantic import Field

from minpro_megatron.config.renamed import SectionWithRenamedSettings


class CollectorConfig(SectionWithRenamedSettings):
    """The collector: its HTTP interface, which only the trainer's rank 0 uses, and the journal."""

    section_name: ClassVar[str] = "collector"

    host: str = Field(
        default="127.0.0.1",
        description="Address on which the collector listens. The default, loopback, is not reachable from other "
        "machines.",
    )
    port: int = Field(default=0, ge=0, le=65535, description="Port of the collector; 0 selects a free port.")
    journal_ratios: bool = Field(
        default=True,
        description="Also store the log-prob of each token under the policy at the update, which takes 4 bytes per "
        "token.",
    )
    journal_keep_steps: int = Field(
        default=50,
        ge=0,
        description="Number of latest global steps whose tokens and log-probs stay in the journal; 0 keeps all.",
    )
    journal_keep_routes: bool = Field(
        default=False,
        description="With model.routing_replay = rollout or sampling.top_k: keep the servers' routes and kept ids as "
        "long as the tokens, to train on the journal again (debug.journal) or to resume from an earlier checkpoint "
        "than the latest. false: they are removed when a checkpoint includes the step that consumed them.",
    )
