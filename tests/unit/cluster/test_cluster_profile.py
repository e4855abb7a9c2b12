"""Profiles: what is accepted, what is refused and how; and where a run's paths are on a cluster."""

from pathlib import Path

import pytest

from minpro_megatron.cluster.paths import CHECKOUT, in_workspace, path_in_workspace
from minpro_megatron.cluster.profile import read_profile
from minpro_megatron.cluster.sections import seconds_of
from minpro_megatron.errors import UserError
from tests.support.run_examples import example_config

PROFILES = sorted((CHECKOUT / "cluster" / "profiles").glob("*.toml"))


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_the_profiles_that_come_with_it_are_valid(path: Path) -> None:
    assert read_profile(path, []).workspace.startswith("/")


def test_jobs_are_in_the_workspace_unless_another_folder_is_given() -> None:
    assert read_profile(PROFILES[0], ["workspace=/a"]).jobs_folder == "/a/jobs"
    assert read_profile(PROFILES[0], ["workspace=/a", "job_dir=/b"]).jobs_folder == "/b"


@pytest.mark.parametrize(
    ("changes", "mounts"),
    [
        (["workspace=/a"], ["/a:/a"]),
        (["workspace=/a", "job_dir=/b/jobs"], ["/a:/a", "/b/jobs:/b/jobs"]),
        (["workspace=/a/b", "job_dir=/a/jobs", 'container.mounts=["/a:/a"]'], ["/a:/a"]),
        (["workspace=/a/b", 'container.mounts=["/a"]'], ["/a"]),
        # under another path, or not to write to, they would not be found
        (["workspace=/a/b", 'container.mounts=["/a:/data"]'], ["/a:/data", "/a/b:/a/b"]),
        (["workspace=/a/b", 'container.mounts=["/a:/a:ro"]'], ["/a:/a:ro", "/a/b:/a/b"]),
    ],
)
def test_the_container_has_the_folders_that_its_processes_write_to(changes: list[str], mounts: list[str]) -> None:
    assert read_profile(PROFILES[0], ["container.mounts=[]", *changes]).mounts == mounts


def test_settings_can_be_changed() -> None:
    profile = read_profile(PROFILES[0], ["slurm.time=02:00:00", "topology.train_nodes=4", "ssh.host=a", "ssh.user=b"])
    assert (profile.slurm.time, profile.topology.train_nodes) == ("02:00:00", 4)
    assert profile.ssh is not None
    assert (profile.ssh.host, profile.ssh.port) == ("a", 22)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("slurm.acount=x", r"slurm.acount: Extra inputs are not permitted \(got 'x'\)"),
        ("workspace=relative", r"workspace: String should match pattern .* \(got 'relative'\)"),
        ("workspace=/a b", r"workspace: String should match"),
        ("workspace=/a;rm", r"workspace: String should match"),
        ("job_dir=/$(touch x)", r"job_dir: String should match"),
        ('slurm.account="a\\nrm -r /"', r"slurm.account: String should match"),
        ("ssh.host=a`b`", r"ssh.host: String should match"),
        ("python=bash", r"python: String should match"),
        ("environment.HF_TOKEN=abc", r"environment: HF_TOKEN looks like a secret.* export it in secrets_file"),
        ("environment.lower=1", r"environment: lower: names must be capital letters"),
        ("slurm.time=1 day", r"slurm.time: String should match"),
        (
            "slurm.time=5",
            r"slurm.end_early_s = 300 must be less than slurm.time = 5 \(300 s\), or every start would end",
        ),
        ("topology.gpus_per_node=-1", r"topology.gpus_per_node: .* greater than or equal to 0"),
        ("slurm.srun=[--label", r"--set 'slurm.srun=\[--label': what begins with \[ must be JSON"),
        ("restarts", r"--set 'restarts': expected section.key=value, such as slurm.time"),
        ("restarts.x=1", r"--set 'restarts.x=1': restarts is not a section"),
    ],
)
def test_what_is_wrong_is_named(change: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        read_profile(PROFILES[0], [change])


def test_a_file_that_is_no_profile_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.toml: No such file or directory; .*/cluster/profiles has examples"):
        read_profile(tmp_path / "none.toml", [])
    (tmp_path / "bad.toml").write_text("a = ")
    with pytest.raises(UserError, match=r"bad.toml: not TOML: "):
        read_profile(tmp_path / "bad.toml", [])


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("10:30", 630), ("24:00:00", 86400), ("1-12", 129600), ("2-01:02", 176520), ("1-00:00:01", 86401),
     ("0", None), ("UNLIMITED", None)],
)  # fmt: skip
def test_time_limits_are_read_as_sbatch_reads_them(time: str, seconds: int | None) -> None:
    assert seconds_of(time) == seconds
    if seconds is None:
        assert read_profile(PROFILES[0], [f"slurm.time={time}"]).slurm.time == time


@pytest.mark.parametrize(
    ("path", "there"),
    [
        ("models/m", "/ws/models/m"),
        ("/checkout/recipes/data/x.jsonl", "/ws/recipes/data/x.jsonl"),
        ("/lustre/m", "/lustre/m"),
        ("/checkouts/m", "/checkouts/m"),
        ("", ""),
    ],
)
def test_paths_of_the_checkout_are_in_the_workspace(path: str, there: str) -> None:
    assert path_in_workspace(path, "/ws", Path("/checkout")) == there


def test_every_path_of_a_run_is_looked_at(tmp_path: Path) -> None:
    benchmark = {"name": "b", "file": "data/b.jsonl"}
    config = example_config(
        Path("here"), runs_dir="runs", evaluation={"num_prompts": 1, "benchmarks": [benchmark]}, debug={"journal": "j"}
    )
    text = in_workspace(config, "/ws", tmp_path).to_json()
    for path in ("runs", "here/hf", "here/megatron", "here/train.jsonl", "here/heldout.jsonl", "data/b.jsonl", "j"):
        assert f'"/ws/{path}"' in text
