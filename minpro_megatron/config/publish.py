"""How new weights reach the rollout servers, and how their arrival is verified."""

from typing import Literal

from pydantic import Field

from minpro_megatron.config.base import Section

# The number of held-out prompts that servers continue after a publication: a single one may have a continuation that is
# certain for any weights.
NUM_CANARY_PROMPTS = 4


class PublishConfig(Section):
    """After every global step the trainer sends its weights to all servers as the next policy version."""

    transport: Literal["broadcast", "shared_memory", "disk"] = Field(
        default="broadcast",
        description="Path of the weights. broadcast sends the ranks' shards through one process group (NCCL, gloo on "
        "CPU). shared_memory copies them to host memory that servers on the same machine read; two buckets must fit "
        "into /dev/shm. disk writes a Hugging Face folder in run_dir, which trainer and servers must both see; it is "
        "also used after another transport has failed, until the run is started again or the other transport works "
        "when it is tried once more.",
    )
    at_start: bool = Field(
        default=True,
        description="Whether a new run sends version 0 to the servers before they sample. This tries the transport, "
        "and checks that the servers then hold the weights that they loaded from model.hf_path and compute the "
        "trainer's log-probs with them; otherwise the first publication follows the first global step. It has no "
        "effect with server.placement = shared, debug.trainer = timer, debug.journal and data.demonstrations.",
    )
    bucket_bytes: int = Field(
        default=512 << 20,
        ge=1,
        description="Size in bytes of one bucket of a transfer; a larger parameter, such as the embedding of a large "
        "model, is a bucket of its own. Rank 0 holds up to four buckets at a time and every server one. On a CPU "
        "16 MiB are faster.",
    )
    pause_mode: Literal["abort", "retract", "in_place"] = Field(
        default="retract",
        description="Treatment of responses in progress when the weights change, with staleness.mode = bounded. abort: "
        "the server returns them, and the rest is requested again. retract: they return to the server's queue, and "
        "their KV cache is computed again; this excludes model.routing_replay = rollout. in_place: they continue with "
        "the KV cache of the old weights, and SGLang runs without overlap scheduling, because with it SGLang would "
        "report the wrong policy version for the token that is sampled while the weights change.",
    )
    flush_cache: bool = Field(
        default=True,
        description="Empty the servers' prefix cache after a publication, because it was computed with the old "
        "weights.",
    )
    canary_tokens: int = Field(
        default=64,
        ge=0,
        description="Number of tokens that each server generates greedily after a publication, for a few held-out "
        "prompts. Their log-probs are compared with the trainer's. 0 turns this check off.",
    )
    canary_tolerance: float = Field(
        default=1.0,
        gt=0,
        description="Largest mean absolute difference of the canaries' log-probs, in nats. A server that exceeds it is "
        "excluded, and if all servers are, the run ends. Smaller differences raise an alarm (alarms.canary_nats, "
        "alarms.canary_factor).",
    )
    timeout_s: float = Field(
        default=600, gt=0, description="Timeout in seconds of each request to a server during a publication."
    )
