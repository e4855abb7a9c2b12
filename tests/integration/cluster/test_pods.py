"""Jobs on Kubernetes and with SkyPilot, as far as one can see them without a cluster: what would be sent, the script of
each node, and how a job is submitted and observed."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from minpro_megatron.cluster import pods, submit
from minpro_megatron.cluster.follow import follow_state
from minpro_megatron.cluster.job_folder import write_job_folder
from minpro_megatron.cluster.job_script import job_script
from minpro_megatron.cluster.records import JobRecord, remember
from minpro_megatron.cluster.slurm_job import JobError, JobState
from minpro_megatron.errors import UserError
from tests.support.described_jobs import CASES, FILLED_IN, PROFILES, described, files_of, filled_in, stored_file

pytest.importorskip("nemo_run")

# The program in the place of Python: it is given the script's arguments, and its own behaviour by the environment.
PYTHON = """\
#!/bin/bash
if [ "$2" = minpro_megatron.parallel.start_number ]; then
    echo "${NUMBER:-11}"
    exit "${NUMBER_STATUS:-0}"
fi
echo "arguments: $*"
echo "variables: $FABRIC|${THE_KEY:-}|$MINPRO_EXIT_STATUS_FILES|$PYTHONPATH"
trap 'echo terminated; exit 75' TERM
[ -z "${STATED:-}" ] || touch "$MINPRO_EXIT_STATUS_FILES.$STATED"
[ -z "${WAITS:-}" ] || { echo waiting; while true; do sleep 0.1; done; }
exit "${STATUS:-0}"
"""
FACTS = {
    "kubernetes": {"MINPRO_JOB": "minpro-a-1f", "MINPRO_JOB_RESTARTS": "0", "JOB_COMPLETION_INDEX": "1"},
    "skypilot": {
        "SKYPILOT_TASK_ID": "sky-managed:1_a",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    },
}
STARTS = {"kubernetes": "minpro-a-1f-0", "skypilot": "sky-managed_1_a-11"}
EXECUTORS = pytest.mark.parametrize("executor", sorted(FACTS))


@pytest.mark.parametrize(("executor", "recipe"), CASES)
def test_what_would_be_submitted_is_as_stored(executor: str, recipe: str) -> None:
    """After an intended change: python -m tests.support.described_jobs, and look through the difference."""
    assert described(executor, recipe) == stored_file(executor, recipe).read_text(encoding="utf-8")


@EXECUTORS
def test_dry_run_prints_settings_objects_and_script(executor: str, capsys: pytest.CaptureFixture[str]) -> None:
    changes = [word for change in FILLED_IN[executor] for word in ("--set", change)]
    arguments = ["recipes.demo:tiny_moe", "--profile", str(PROFILES / f"{executor}.toml"), *changes, "--dry-run"]
    assert submit.main(arguments) == 0
    shown = capsys.readouterr().out
    settings, script = shown.split("# the script of each node\n")
    assert '"runs_dir": "/workspace/minpro/' in settings
    title = "# the objects\n" if executor == "kubernetes" else "# SkyPilot's task\n"
    objects = list(yaml.safe_load_all(settings.split(title)[1]))
    assert len(objects) == (2 if executor == "kubernetes" else 1)
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert checked.stderr == ""


class Node:
    """The script of a node, with a program in the place of Python, and its workspace in a folder of this machine."""

    def __init__(self, executor: str, folder: Path, changes: list[str]) -> None:
        self.executor, self.workspace, self.job = executor, folder / "work", folder / "job"
        self.workspace.mkdir()
        (self.job / "code").mkdir(parents=True)
        python = folder / "a python"
        python.write_text(PYTHON)
        python.chmod(0o755)
        self.profile = filled_in(executor, [f"workspace={self.workspace}", f"python={python}", *changes])
        (self.job / "job.sh").write_text(job_script(self.profile, 2))

    def run(self, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(self.job / "job.sh")],
            env=self.environment(variables),
            text=True,
            capture_output=True,
            check=False,
        )

    def environment(self, variables: dict[str, str]) -> dict[str, str]:
        return {"PATH": os.environ["PATH"]} | FACTS[self.executor] | variables


@pytest.fixture
def node(tmp_path: Path) -> Callable[..., Node]:
    return lambda executor, *changes: Node(executor, tmp_path, list(changes))


@EXECUTORS
def test_the_script_gives_each_node_its_place_and_its_variables(
    executor: str, node: Callable[..., Node], tmp_path: Path
) -> None:
    value = "a b; touch /tmp/x $HOME `id` \"q\" 'r' $$ $(id)"
    secrets = tmp_path / "secrets.sh"
    secrets.write_text("export THE_KEY=abc123\n")
    one = node(
        executor, f"environment.FABRIC={value}", f"secrets_file={secrets}", f"{executor}.interface=eth0; touch y"
    )
    ended = one.run()
    assert (ended.returncode, ended.stderr) == (0, "")
    start, early = STARTS[executor], "--end-early-s 300 " if executor == "kubernetes" else ""
    arguments, variables = ended.stdout.splitlines()
    assert arguments == (
        f"arguments: -m minpro_megatron node --config {one.job}/run.json --topology {one.job}/topology.json {early}"
        f"--interface eth0; touch y --job {start.rpartition('-')[0]} --start {start} --index 1"
    )
    assert variables == f"variables: {value}|abc123|{one.workspace}/jobs/states/{start}|{one.job}/code"
    assert "abc123" not in described_job(one)


def test_the_launcher_knows_the_shortest_grace_of_a_pod(node: Callable[..., Node]) -> None:
    """Kubernetes kills after 30 s also where the profile asks for no time."""
    one = node("kubernetes", "kubernetes.end_early_s=0")
    assert "--end-early-s 30 " in one.run().stdout
    assert "terminationGracePeriodSeconds: 30\n" in described_job(one)


def described_job(one: Node) -> str:
    return pods.description(files_of("recipes.demo:tiny_moe", one.profile), one.profile)


@EXECUTORS
@pytest.mark.parametrize(
    ("status", "stated", "expected"),
    [
        (0, "", 0),
        (2, "", 2),  # refused
        (75, "", 75),  # saved before its end
        (1, "2", 2),  # this node fails because another one was refused
        (143, "75", 75),
        (1, "", 75),  # a failure, with restarts left
        (137, "", 75),
    ],
)
def test_the_script_maps_the_exit_status(
    executor: str, status: int, stated: str, expected: int, node: Callable[..., Node]
) -> None:
    assert node(executor).run(STATUS=str(status), STATED=stated).returncode == expected


@EXECUTORS
def test_failed_starts_are_counted_and_planned_ends_are_not(executor: str, node: Callable[..., Node]) -> None:
    one = node(executor, "restarts=2")
    statuses = []
    for number, status in enumerate((1, 75, 69, 75, 70)):
        again = {"MINPRO_JOB_RESTARTS": str(number), "NUMBER": str(number)}
        statuses += [one.run(STATUS=str(status), **again).returncode for _ in range(2)]  # both nodes of the start
    assert statuses == [75] * 8 + [70] * 2
    last = one.run(STATUS="70", **again).stdout.splitlines()[-1]
    assert last == "exit status 70: not started again; failed starts: 3, restarts = 2 in the profile"


@EXECUTORS
def test_a_workspace_that_is_not_mounted_is_not_tried_again(executor: str, node: Callable[..., Node]) -> None:
    one = node(executor)
    one.workspace.rmdir()
    ended = one.run()
    assert ended.returncode == 2
    assert ended.stderr == (
        f"error: workspace = {one.workspace} is not a folder on this node: mount the shared file system there\n"
    )


def test_nodes_that_do_not_find_each_other_are_a_failed_start(node: Callable[..., Node]) -> None:
    one = node("skypilot", "restarts=1")
    assert one.run(NUMBER_STATUS="69").returncode == 75
    time.sleep(1.1)  # starts without a name differ by the second in which they begin
    assert one.run(NUMBER_STATUS="69").returncode == 69


@EXECUTORS
def test_the_script_hands_on_the_signal_of_a_pods_end(executor: str, node: Callable[..., Node]) -> None:
    one = node(executor)
    script = subprocess.Popen(
        ["bash", str(one.job / "job.sh")], env=one.environment({"WAITS": "1"}), text=True, stdout=subprocess.PIPE
    )
    assert script.stdout is not None
    lines = [script.stdout.readline() for _ in range(3)]
    assert lines[-1] == "waiting\n"
    script.send_signal(signal.SIGTERM)
    assert script.stdout.read() == "terminated\n"
    assert script.wait(20) == 75


def test_a_job_folder_has_script_settings_and_code(tmp_path: Path) -> None:
    profile = filled_in("kubernetes", [])
    files = files_of("recipes.demo:tiny_moe", profile)
    write_job_folder(tmp_path / "job", files, profile)
    assert sorted(path.name for path in (tmp_path / "job").iterdir()) == ["code", "job.sh", "run.json", "topology.json"]
    assert (tmp_path / "job" / "run.json").read_text() == files.run_json
    assert (tmp_path / "job" / "code" / "minpro_megatron" / "__init__.py").is_file()
    assert (tmp_path / "job" / "code" / "REVISION").read_text().strip()


@pytest.mark.parametrize(
    ("executor", "changes", "problem"),
    [
        ("kubernetes", ["kubernetes.claim="], "kubernetes.claim is missing: name a PersistentVolumeClaim"),
        ("kubernetes", ["container.image="], "container.image is missing: with executor = kubernetes every node runs"),
        ("kubernetes", ["kubernetes.claim=a;b"], "kubernetes.claim: String should match pattern"),
        ("kubernetes", ["kubernetes.memory=lots"], "kubernetes.memory: String should match pattern"),
        ("kubernetes", ["job_dir=/other"], "job_dir = /other must be inside workspace = /workspace/minpro"),
        ("kubernetes", ["slurm.qos=a"], r"executor = kubernetes does not use \[slurm\]: remove it, or change executor"),
        ("kubernetes", ['container.mounts=["/a:/a"]'], "container.mounts is not used with executor = kubernetes"),
        ("skypilot", ["skypilot.infra="], "skypilot.infra is missing: k8s/CONTEXT, or a cloud"),
        ("skypilot", ["skypilot.infra=aws"], r"skypilot.claim = shared needs skypilot.infra = k8s/...: mount"),
        ("skypilot", ["skypilot.claim="], "skypilot.setup is empty: give the commands that mount .* or skypilot.claim"),
        ("skypilot", ["skypilot.accelerator="], "skypilot.accelerator is missing for topology.gpus_per_node = 8"),
    ],
)
def test_what_a_profile_lacks_is_named(executor: str, changes: list[str], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        filled_in(executor, changes)


@EXECUTORS
def test_placeholders_are_refused(executor: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main(["recipes.demo:tiny_moe", "--profile", str(PROFILES / f"{executor}.toml"), "--dry-run"]) == 2
    named = [line.split(": ")[2].split(" = ")[0] for line in capsys.readouterr().err.splitlines()]
    own = {"kubernetes": ["kubernetes.namespace", "kubernetes.claim"], "skypilot": ["skypilot.infra", "skypilot.claim"]}
    assert named == [*own[executor], "container.image"]


@pytest.mark.parametrize(
    ("executor", "package", "remedy"),
    [
        ("kubernetes", "kubernetes", "pip install 'minpro-megatron\\[kubernetes\\]'"),
        ("skypilot", "sky", "pip install 'minpro-megatron\\[cluster,skypilot\\]'"),
    ],
)
def test_a_missing_package_is_named(
    executor: str, package: str, remedy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from minpro_megatron.cluster import kubeflow, skypilot

    for module in (kubeflow, skypilot):
        monkeypatch.setattr(module, "find_spec", lambda name: None if name == package else object())
    profile = filled_in(executor, [])
    with pytest.raises(UserError, match=f"executor = {executor} needs .*{remedy}"):
        pods.submit(files_of("recipes.demo:tiny_moe", profile), profile, tmp_path / "records")


def test_a_second_job_of_a_run_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    profile = filled_in("kubernetes", [])
    files = files_of("recipes.demo:tiny_moe", profile)
    record = JobRecord(
        name=files.name, job_id="minpro-demo-1", run_dir="/r", log_folder="/l", submitted_at=1.0, executor="kubernetes",
        namespace="rl",
    )  # fmt: skip
    remember(tmp_path, record)
    monkeypatch.setattr(pods, "look_up", lambda record: JobState(state="RUNNING"))
    with pytest.raises(UserError, match=r"job minpro-demo-1 of this name has not ended \(RUNNING\); cancel it"):
        pods.submit(files, profile, tmp_path)


def test_the_output_of_a_trainjob_is_shown_by_kubectl() -> None:
    record = JobRecord(
        name="a", job_id="minpro-a-1f", run_dir="/r", log_folder="/l", submitted_at=1.0, executor="kubernetes",
        namespace="rl",
    )  # fmt: skip
    with pytest.raises(UserError) as refused:
        pods.show_logs(record)
    assert refused.value.problems == [
        "job minpro-a-1f: its output is shown by kubectl logs -n rl -l jobset.sigs.k8s.io/jobset-name=minpro-a-1f "
        "--prefix --tail=-1"
    ]


def test_following_reports_changes_and_believes_a_failure_that_stays() -> None:
    states = ["PENDING", "RUNNING", "FAILED", "RUNNING", None, "RUNNING", "FAILED", "FAILED"]
    said: list[str] = []

    def look() -> JobState:
        state = states.pop(0)
        if state is None:
            raise JobError("no answer")
        return JobState(state=state, exit_status=int(state == "FAILED"))

    ended = follow_state(look, "7", said.append, poll_s=0)
    assert (ended.state, states) == ("FAILED", [])
    assert said == ["job 7: PENDING", "job 7: RUNNING", "job 7: FAILED (exit status 1)"]


def test_the_nodes_of_a_start_agree_on_its_number() -> None:
    from minpro_megatron.parallel.start_number import agree
    from minpro_megatron.serving.ports import free_ports

    (port,) = free_ports("127.0.0.1", 1)
    numbers: dict[int, int] = {}
    threads = [
        threading.Thread(target=lambda index=index: numbers.update({index: agree(index, 3, "127.0.0.1", port, 60.0)}))
        for index in (2, 1, 0)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(numbers) == [0, 1, 2]
    assert len(set(numbers.values())) == 1


def test_nodes_that_do_not_arrive_are_counted() -> None:
    from minpro_megatron.errors import TryAgainError
    from minpro_megatron.parallel.start_number import agree
    from minpro_megatron.serving.ports import free_ports

    (port,) = free_ports("127.0.0.1", 1)
    with pytest.raises(TryAgainError, match="1 of 2 nodes have started within 1 s"):
        agree(0, 2, "127.0.0.1", port, 1.0)
    with pytest.raises(TryAgainError, match=rf"node 1 cannot reach node 0 at 127.0.0.1:{port}"):
        agree(1, 2, "127.0.0.1", port, 1.0)
