"""What `minpro submit --dry-run` prints for a job on Kubernetes and with SkyPilot, as stored in files that a reader can
look through.

    python -m tests.support.described_jobs     (writes the files again)
"""

from pathlib import Path

from minpro_megatron.cluster.job_files import JobFiles
from minpro_megatron.cluster.paths import CHECKOUT, in_workspace
from minpro_megatron.cluster.pods import description
from minpro_megatron.cluster.profile import Profile, read_profile
from minpro_megatron.launch.recipe import load_recipe
from minpro_megatron.launch.topology import lay_out

FOLDER = CHECKOUT / "tests" / "integration" / "cluster" / "described_jobs"
PROFILES = CHECKOUT / "cluster" / "profiles"
# What a user has to fill in.
FILLED_IN = {
    "kubernetes": ["kubernetes.namespace=rl", "kubernetes.claim=shared", "container.image=ours/minpro:1"],
    "skypilot": ["skypilot.infra=k8s/ours", "skypilot.claim=shared", "container.image=ours/minpro:1"],
}
# The largest, with everything that a fast network needs, and the smallest, on nodes without GPUs.
CASES = {
    ("kubernetes", "qwen3_30b_a3b"): (
        "recipes.qwen3_30b_a3b:minpro",
        [
            "kubernetes.queue=training",
            'kubernetes.resources={"rdma/hca_shared_devices_a": "1"}',
            'kubernetes.annotations={"k8s.v1.cni.cncf.io/networks": "default/rdma-net"}',
            'kubernetes.node_selector={"gpu": "h100"}',
            'kubernetes.image_pull_secrets=["registry"]',
            "secrets_file=/workspace/minpro/secrets.sh",
        ],
    ),
    ("kubernetes", "tiny_moe"): (
        "recipes.demo:tiny_moe",
        ["topology.gpus_per_node=0", "kubernetes.cpus=", "kubernetes.memory=", "kubernetes.end_early_s=0"],
    ),
    ("skypilot", "qwen3_30b_a3b"): (
        "recipes.qwen3_30b_a3b:minpro",
        ["secrets_file=/workspace/minpro/secrets.sh", "skypilot.interface=eth1"],
    ),
    ("skypilot", "tiny_moe"): (
        "recipes.demo:tiny_moe",
        [
            "skypilot.infra=aws/us-east-1",
            "skypilot.claim=",
            'skypilot.setup=["sudo mount -t nfs4 10.0.0.2:/export /workspace/minpro"]',
            "skypilot.use_spot=true",
            "skypilot.network_tier=",
            "topology.gpus_per_node=0",
        ],
    ),
}


def filled_in(executor: str, changes: list[str]) -> Profile:
    """The profile that comes with the project, with a user's values."""
    return read_profile(PROFILES / f"{executor}.toml", [*FILLED_IN[executor], *changes])


def files_of(recipe: str, profile: Profile) -> JobFiles:
    """The files of the recipe's job, with the settings of its run."""
    config = in_workspace(load_recipe(recipe), profile.workspace)
    topology = lay_out(config, profile.topology)
    return JobFiles(
        name=config.name,
        run_json=config.to_json(),
        topology_json=topology.to_json(),
        num_nodes=len(topology.nodes),
    )


def stored_file(executor: str, recipe: str) -> Path:
    return FOLDER / f"{executor}_{recipe}.txt"


def described(executor: str, name: str) -> str:
    """The description of the case."""
    recipe, changes = CASES[executor, name]
    profile = filled_in(executor, changes)
    return description(files_of(recipe, profile), profile)


def main() -> None:
    for executor, name in CASES:
        stored_file(executor, name).write_text(described(executor, name), encoding="utf-8")


if __name__ == "__main__":
    main()
