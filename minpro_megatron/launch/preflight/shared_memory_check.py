"""Whether the buckets of publish.transport = shared_memory fit into the shared memory of the trainer's machine."""

from collections.abc import Iterator
from pathlib import Path

from minpro_megatron.config.run import RunConfig
from minpro_megatron.files.disk_space import SHARED_MEMORY, as_size, free_bytes
from minpro_megatron.models.architecture import read_architecture
from minpro_megatron.planning.memory import shared_bucket_bytes


def shared_memory_problems(config: RunConfig, file_system: Path = SHARED_MEMORY) -> Iterator[str]:
    """A problem if two buckets do not fit: writing to them would end the publication, or the process."""
    if config.publish.transport != "shared_memory" or not (Path(config.model.hf_path) / "config.json").is_file():
        return  # a missing model is reported elsewhere
    needed, free = shared_bucket_bytes(config, read_architecture(config.model.hf_path)), free_bytes(file_system)
    if free < needed:
        other = "disk" if config.server.takes_turns else "broadcast"
        yield (
            f"publish.transport = shared_memory with publish.bucket_bytes = {config.publish.bucket_bytes}: two buckets "
            f"are {as_size(needed)}, and {file_system} has {as_size(free)} free: enlarge it (docker run --shm-size), "
            f"lower publish.bucket_bytes, or set publish.transport to {other}"
        )
