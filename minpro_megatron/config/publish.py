"""How new weights reach the rollout servers, and how it is checked that they have arrived."""

from typing import Literal

from pydantic import Field

from minpro_megatron.config.base import Section


class PublishConfig(Section):
    """After every global step the trainer sends its weights to all servers as the next policy version."""

    transport: Literal["broadcast", "disk"] = Field(
        default="broadcast",
        description="broadcast: from the ranks' shards through one process group (NCCL, gloo on CPU); disk: a Hugging "
        "Face folder in run_dir that trainer and servers both see; also what is used where a broadcast fails",
    )
    bucket_bytes: int = Field(
        default=512 << 20,
        ge=1,
        description="of a broadcast; rank 0 holds about three at a time, every server one; on a CPU 16 MiB are faster",
    )
    pause_mode: Literal["abort", "retract", "in_place"] = Field(
        default="retract",
        description="what happens to responses under way when weights change (bounded staleness only): abort: the "
        "server returns them and the rest is requested again; retract: they go back to the server's queue and their KV "
        "cache is computed again (not with model.routing_replay = rollout); in_place: they go on with the KV cache of "
        "the old weights, and SGLang runs without overlap scheduling, for otherwise it would name the wrong version "
        "for the token that is being sampled when the weights change",
    )
    flush_cache: bool = Field(default=True, description="empty the servers' prefix cache: it is of the old weights")
    canary_tokens: int = Field(
        default=64,
        ge=0,
        description="greedy tokens that each server generates after a publication, spread over a few held-out prompts, "
        "and the trainer's log-probs of them are compared; 0: none",
    )
    canary_tolerance: float = Field(
        default=1.0,
        gt=0,
        description="largest mean difference of their log-probs, in nats; a server beyond it is excluded, and if all "
        "are, the run ends. Smaller differences raise an alarm (alarms.canary_nats, alarms.canary_factor)",
    )
    timeout_s: float = Field(default=600, gt=0, description="for each request to a server while publishing")
