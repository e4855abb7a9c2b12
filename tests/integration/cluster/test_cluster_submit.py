"""submit up to the script: what it refuses, and what it would give to sbatch."""

import contextlib
import functools
import gc
import io
import logging
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from minpro_megatron.cluster import job_files, submit
from minpro_megatron.cluster.paths import CHECKOUT
from minpro_megatron.cluster.planning import plan_problems
from minpro_megatron.cluster.profile import read_profile
from minpro_megatron.cluster.slurm_job import no_restart_file
from minpro_megatron.errors import FAILED, TO_BE_CONTINUED, TRY_AGAIN, UserError
from minpro_megatron.launch.recipe import list_recipes, load_recipe
from minpro_megatron.launch.topology import lay_out
from tests.support.long_cases import long_after
from tests.support.recipe_kinds import with_each_run

H100 = CHECKOUT / "cluster" / "profiles" / "h100_slurm.toml"
# What a user has to fill in.
MINE = [
    "--set", "workspace=/lustre/mine", "--set", "slurm.account=me", "--set", "slurm.partition=gpus",
    "--set", "container.image=ours#minpro:1",
]  # fmt: skip
RECIPES = [line.split()[0] for line in list_recipes("recipes")]
# One of each kind of job: on many nodes with its own servers, and the smallest.
KINDS = ["recipes.qwen3_30b_a3b:minpro", "recipes.demo:tiny_moe"]


@pytest.fixture(autouse=True)
def _no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs commands for NeMo-Run hands them this process's input, which pytest does not let it read."""
    monkeypatch.setattr(sys, "stdin", io.StringIO())


def submitted(capsys: pytest.CaptureFixture[str], recipe: str, *arguments: str) -> tuple[int, str, str]:
    """Exit status, output and errors."""
    status = submit.main([recipe, "--profile", str(H100), *MINE, "--dry-run", *arguments])
    shown = capsys.readouterr()
    return status, shown.out, shown.err


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_a_place_on_h100_nodes(recipe: str) -> None:
    profile = read_profile(H100, [])
    topology = lay_out(load_recipe(recipe), profile.topology)
    assert topology.nodes


@pytest.mark.parametrize(
    "recipe", long_after(len(KINDS), sorted(with_each_run(RECIPES), key=lambda one: one not in KINDS))
)
def test_recipes_dry_run_to_a_script(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("nemo_run")
    status, shown, errors = submitted(capsys, recipe)
    assert (status, errors) == (0, "")
    script = shown[shown.index("#!/bin/bash") :]
    nodes = sum(line.startswith("node ") for line in shown.splitlines())
    options = ("--ntasks-per-node=1", "--gpus-per-node=8", "--signal=TERM@300", "--exclusive", "--mem=0")
    for line in (f"#SBATCH --nodes={nodes}", *(f"#SBATCH {option}" for option in options)):
        assert line in script.splitlines()
    (srun,) = [line for line in script.splitlines() if line.startswith("srun ")]
    assert srun.endswith(
        " --wait=60 --kill-on-bad-exit=1 --wait=0 --cpu-bind=none python -m minpro_megatron node "
        "--config /nemo_run/configs/run.json --topology /nemo_run/configs/topology.json --end-early-s 300"
    )
    assert "--container-mounts /lustre/mine:/lustre/mine," in srun
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert checked.stderr == ""


def test_values_reach_processes_as_they_are(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """No value of a profile is a piece of shell; secrets are neither written nor traced."""
    pytest.importorskip("nemo_run")
    value = "a b; touch /tmp/x $HOME `id` \"q\" 'r' $head_node_ip_var $$"
    secrets = tmp_path / "secrets.sh"
    secrets.write_text("export THE_KEY=abc123\n")
    changes = [f"environment.FABRIC={value}", "slurm.interface=eth0; touch y", f"secrets_file={secrets}"]
    options = [word for change in changes for word in ("--set", change)]
    status, shown, _ = submitted(capsys, "recipes.demo:tiny_moe", *options)
    assert status == 0
    script = shown[shown.index("#!/bin/bash") :]
    # the script's own srun and scontrol, replaced by one that shows what it is given
    (tmp_path / "srun").write_text('#!/bin/bash\necho "got: $FABRIC|$THE_KEY|${*: -1}"; exit 2\n')
    (tmp_path / "scontrol").write_text('#!/bin/bash\necho "scontrol $*"\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    run = subprocess.run(["bash"], input=script, env=environment, text=True, capture_output=True, check=False)
    lines = run.stdout.splitlines()
    assert f"got: {value}|abc123|eth0; touch y" in lines
    assert lines[-2:] == ["job exited with code 2", "not started again: the problems above have to be fixed first"]
    assert run.returncode == 2
    assert "abc123" not in run.stderr
    failed = environment | {"SLURM_RESTART_COUNT": "1"}
    for status in (FAILED, TRY_AGAIN):
        (tmp_path / "srun").write_text(f"#!/bin/bash\nexit {status}\n")
        run = subprocess.run(["bash"], input=script, env=failed, text=True, capture_output=True, check=False)
        assert (run.returncode, run.stdout.splitlines()[-1]) == (status, "scontrol requeue 7")


def test_ends_before_the_time_limit_do_not_count_as_failures(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """With two restarts a job may fail three times, however often its time limit ended a start."""
    pytest.importorskip("nemo_run")
    (tmp_path / "jobs").mkdir()
    changes = ["--set", "restarts=2", "--set", f"job_dir={tmp_path / 'jobs'}"]
    _, shown, _ = submitted(capsys, "recipes.demo:tiny_moe", *changes)
    script = shown[shown.index("#!/bin/bash") :]
    (tmp_path / "scontrol").write_text('#!/bin/bash\necho "scontrol $*"\n')
    (tmp_path / "squeue").write_text("#!/bin/bash\necho 2030-01-02T03:04:05\n")
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "TZ": "UTC"}
    last_lines = []
    for count, status in enumerate((75, 1, 75, 75, 1, 75, 1, 1)):
        srun = tmp_path / "srun"
        srun.write_text(f'#!/bin/bash\n[ "${{*: -1}}" = 300 ] && echo "end $SLURM_JOB_END_TIME"; exit {status}\n')
        for name in ("scontrol", "squeue", "srun"):
            (tmp_path / name).chmod(0o755)
        started = environment | ({"SLURM_RESTART_COUNT": str(count)} if count else {})
        run = subprocess.run(["bash"], input=script, env=started, text=True, capture_output=True, check=False)
        assert run.returncode == status
        assert "end 1893553445" in run.stdout.splitlines()
        last_lines.append(run.stdout.splitlines()[-1])
    ends = [f"not started again: failed starts: {count}, restarts = 2 in the profile" for count in (3, 4)]
    assert last_lines == [*["scontrol requeue 7"] * 6, *ends]


JOBS = "/the/folder/of/jobs"


@functools.cache
def script_without_restarts() -> str:
    """Of a job whose files are in `JOBS`."""
    shown = io.StringIO()
    changes = [*MINE, "--set", "restarts=0", "--set", f"job_dir={JOBS}"]
    with contextlib.redirect_stdout(shown):
        assert submit.main(["recipes.demo:tiny_moe", "--profile", str(H100), *changes, "--dry-run"]) == 0
    return shown.getvalue()[shown.getvalue().index("#!/bin/bash") :]


@pytest.mark.parametrize(
    ("stated", "status", "last_line"),
    [
        (("end requested", 75), 75, "not started again: its end was requested"),
        (("end requested",), 143, "not started again: its end was requested"),
        ((2,), 2, "not started again: the problems above have to be fixed first"),
        ((75, 2), 2, "not started again: the problems above have to be fixed first"),
        ((75,), 75, "scontrol requeue 7"),
        ((), 143, "not started again: failed starts: 1, restarts = 0 in the profile"),
    ],
)
def test_a_status_that_srun_hides_decides_about_the_restart(
    stated: tuple[int | str, ...], status: int, last_line: str, tmp_path: Path
) -> None:
    """One node states its status and ends with it; srun ends the others by a signal and returns 143."""
    pytest.importorskip("nemo_run")
    (tmp_path / "jobs").mkdir()
    script = script_without_restarts().replace(JOBS, f"{tmp_path}/jobs")
    assert f"--container-mounts /lustre/mine:/lustre/mine,{tmp_path}/jobs:{tmp_path}/jobs," in script
    numbers = [status for status in stated if isinstance(status, int)]
    request = f"touch {no_restart_file(f'{tmp_path}/jobs', '7')}" if "end requested" in stated else "true"
    state = f"from minpro_megatron.launch.job_status import *; [state_exit_status(s, os.environ) for s in {numbers}]"
    (tmp_path / "srun").write_text(
        f'#!/bin/bash\n[ -n "$MINPRO_EXIT_STATUS_FILES" ] || exit 0\n'
        f"{sys.executable} -c 'import os; {state}'\n{request}\nexit 143\n"
    )
    (tmp_path / "scontrol").write_text('#!/bin/bash\necho "scontrol $*"\n')
    for name in ("scontrol", "srun"):
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    run = subprocess.run(["bash"], input=script, env=environment, text=True, capture_output=True, check=False)
    assert (run.returncode, run.stdout.splitlines()[-1]) == (status, last_line), run.stderr


def test_a_job_that_slurm_requeues_after_a_request_to_end_does_not_run_on(tmp_path: Path) -> None:
    """Slurm starts a job again by itself after the loss of a node or a preemption, without asking its script."""
    pytest.importorskip("nemo_run")
    (tmp_path / "jobs").mkdir()
    Path(no_restart_file(f"{tmp_path}/jobs", "7")).touch()
    for name in ("scontrol", "srun"):
        (tmp_path / name).write_text(f'#!/bin/bash\necho "{name} $*"\n')
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    environment["SLURM_RESTART_COUNT"] = "1"
    script = script_without_restarts().replace(JOBS, f"{tmp_path}/jobs")
    run = subprocess.run(["bash"], input=script, env=environment, text=True, capture_output=True, check=False)
    assert run.returncode == TO_BE_CONTINUED
    lines = run.stdout.splitlines()
    assert lines[-2:] == ["not started again: its end was requested", "job exited with code 75"]
    assert not [line for line in lines if line.startswith(("srun ", "scontrol requeue"))]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["optimizer.lr=1"], "error: override 'optimizer.lr=1': there is no setting 'lr'; known: learning_rate"),
        (["optimizer.learning_rate=fast"], "error: optimizer.learning_rate: Input should be a valid number"),
        (["parallel.expert=3", "parallel.data=1"], "error: parallel: expert x expert_tensor = 3 x 1 = 3 must divide"),
        (["parallel.tensor=16", "parallel.data=1"], "error: "),
        (["--set", "topology.serve_nodes=1"], "error: server.count = 20 on topology.serve_nodes = 1: 20 per node"),
        (["--set", "slurm.tme=1"], "slurm.tme: Extra inputs are not permitted"),
    ],
)
def test_what_is_wrong_is_said_here(arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, shown, errors = submitted(capsys, "recipes.qwen3_30b_a3b:minpro", *arguments)
    assert (status, shown) == (2, "")
    assert problem in errors
    assert "Traceback" not in errors


def test_placeholders_of_a_profile_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main(["recipes.demo:tiny_moe", "--profile", str(H100), "--dry-run"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert [line.split(": ")[2] for line in shown.err.splitlines()] == [
        "workspace = '/lustre/PROJECT/minpro'",
        "slurm.account = 'ACCOUNT'",
        "slurm.partition = 'PARTITION'",
        "container.image = 'REGISTRY#minpro-megatron:0.1.0'",
    ]


def test_a_run_that_does_not_fit_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["parallel.data=0", "parallel.tensor=1", "parallel.pipeline=1", "parallel.expert=1"]
    status, _, errors = submitted(capsys, "recipes.qwen3_30b_a3b:minpro", *small)
    assert status == 2
    assert errors.splitlines()[-1] == "error: the planner expects that this run does not fit; --force submits it anyway"
    config = load_recipe("recipes.qwen3_30b_a3b:minpro")  # which test_recipes_dry_run_to_a_script plans
    assert plan_problems(config, read_profile(H100, ["gpu=abacus"]))[0].startswith("gpu = abacus: not known")
    assert plan_problems(load_recipe("recipes.demo:tiny_moe"), read_profile(H100, ["gpu=abacus"])) == []


def test_the_job_gets_the_code_as_it_is_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nemo = pytest.importorskip("minpro_megatron.cluster.nemo")
    checkout, job = tmp_path / "checkout", tmp_path / "job"
    checkout.mkdir()
    job.mkdir()
    for name, text in {"old.py": "1", "gone.py": "1", ".gitignore": "ignored\n"}.items():
        (checkout / name).write_text(text)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], cwd=checkout, check=True)
    (checkout / "gone.py").unlink()
    (checkout / "link").symlink_to(tmp_path)
    for name in ("old.py", "new file.py", "ignored"):
        (checkout / name).write_text("2")
    monkeypatch.setattr(job_files, "CHECKOUT", checkout)
    archive = nemo.WorkingTree(configs={"run.json": "{}\n"}).package(tmp_path, str(job), "a")
    with tarfile.open(archive) as tar:
        assert sorted(tar.getnames()) == [".gitignore", "REVISION", "link", "new file.py", "old.py"]
        content = {
            name: (tar.extractfile(name) or pytest.fail(name)).read().decode() for name in ("old.py", "REVISION")
        }
    assert content["old.py"] == "2"
    assert content["REVISION"].endswith("+changes\n")
    assert (job / "configs" / "run.json").read_text() == "{}\n"


def test_the_job_of_an_installed_package_gets_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nemo = pytest.importorskip("minpro_megatron.cluster.nemo")
    package = tmp_path / "site-packages" / "minpro_megatron"
    (package / "recipes").mkdir(parents=True)
    (package / "recipes" / "demo.py").write_text("1")
    monkeypatch.setattr(job_files, "CHECKOUT", tmp_path)
    monkeypatch.setattr(job_files, "_PACKAGE", package)
    archive = nemo.WorkingTree().package(tmp_path, str(tmp_path), "a")
    with tarfile.open(archive) as tar:
        assert tar.getnames() == ["minpro_megatron/recipes/demo.py", "REVISION"]


@pytest.mark.parametrize("program", ["sbatch", "mkdir"])
def test_a_refusal_of_the_cluster_is_reported_in_its_words(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nemo = pytest.importorskip("minpro_megatron.cluster.nemo")
    (tmp_path / program).write_text(f"#!/bin/bash\necho '{program}: error: no such partition' >&2; exit 3\n")
    (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(job_files, "code_files", dict)
    files = nemo.JobFiles(name="a", run_json="{}", topology_json="{}", num_nodes=2)
    with pytest.raises(UserError) as refused:
        nemo.submit(files, read_profile(H100, [f"workspace={tmp_path}"]))
    assert refused.value.problems[0] == f"{program}: error: no such partition"
    assert refused.value.problems[-1].startswith(f"the job was not submitted: {program} failed with exit status 3: ")


def test_logging_is_as_it_was(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("nemo_run")
    with caplog.at_level("INFO"):
        assert submitted(capsys, "recipes.demo:tiny_moe")[0] == 0
        logging.getLogger("after").info("still heard")
    assert "still heard" in caplog.text


def test_logging_is_as_it_was_after_the_experiments_are_collected(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("nemo_run")
    root = logging.getLogger()
    before = list(root.handlers)
    first = logging.NullHandler()
    root.handlers.insert(0, first)
    try:
        assert submitted(capsys, "recipes.demo:tiny_moe")[0] == 0
        gc.collect()
        assert root.handlers == [first, *before]
    finally:
        root.handlers = before
