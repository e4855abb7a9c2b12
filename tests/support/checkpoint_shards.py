"""Shards of a checkpoint and the manifest that names them, without a model."""

from datetime import UTC, datetime
from pathlib import Path

from minpro_megatron.checkpoints.manifest import FileRecord, RunIdentity, RunManifest

RUN = RunIdentity(
    seed=3,
    objective="minpro",
    dtype="float32",
    parallel={"tensor": 2},
    architecture={"num_layers": 4, "rope_theta": 1e6, "tied_embeddings": False},
)
DATA = b"shard"


def manifest_of(version: int) -> RunManifest:
    return RunManifest(
        policy_version=version,
        updates=4 * version,
        run=RUN,
        created=datetime(2026, 8, 1, 12, 30, tzinfo=UTC),
        files={"__0_0.distcp": FileRecord(bytes=len(DATA), sha256="0" * 64)},
    )


def write_shards(partial: Path) -> Path:
    (partial / "__0_0.distcp").write_bytes(DATA)
    return partial
