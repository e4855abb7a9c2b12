"""Jobs on Kubernetes and with SkyPilot with their real packages, where these are installed (docs/cluster.md): what is
sent to a server, and what is made of its answers. The servers here only store what they are given."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from minpro_megatron.cluster import pods
from minpro_megatron.cluster.records import JobRecord
from minpro_megatron.cluster.slurm_job import JobError
from minpro_megatron.errors import UserError
from tests.support.described_jobs import CASES, FOLDER, files_of, filled_in, stored_file

TRAINER = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/rl"


class Objects(BaseHTTPRequestHandler):
    """Custom objects of Kubernetes by their path: created once, replaced, read and deleted."""

    stored: dict[str, Any]
    refuses: int

    def do_POST(self) -> None:
        sent = self._sent()
        path = f"{self.path}/{sent['metadata']['name']}"
        if self.refuses:
            self._answer(self.refuses, {"message": "admission webhook: no such queue"})
        elif path in self.stored:
            self._answer(409, {"message": "exists"})
        else:
            sent["metadata"]["resourceVersion"] = "1"
            self.stored[path] = sent
            self._answer(201, sent)

    def do_PUT(self) -> None:
        sent = self._sent()
        metadata = sent["metadata"]
        if metadata.get("resourceVersion") != self.stored[self.path]["metadata"]["resourceVersion"]:
            self._answer(422, {"message": "metadata.resourceVersion must be specified for an update"})
            return
        metadata["resourceVersion"] = str(int(metadata["resourceVersion"]) + 1)
        self.stored[self.path] = sent
        self._answer(200, sent)

    def do_GET(self) -> None:
        found = self.stored.get(self.path)
        self._answer(404 if found is None else 200, found or {})

    def do_DELETE(self) -> None:
        self._answer(200, self.stored.pop(self.path))

    def _sent(self) -> Any:
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def _answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing is logged."""


@pytest.fixture
def objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Objects]]:
    """The objects of a server, which the current context of kubectl's configuration names."""
    pytest.importorskip("nemo_run")
    pytest.importorskip("kubernetes")
    from kubernetes.config import kube_config

    from minpro_megatron.cluster import kubeflow

    kind = type("Stored", (Objects,), {"stored": {}, "refuses": 0})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    configuration = {
        "clusters": [{"name": "a", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "users": [{"name": "a", "user": {}}],
        "contexts": [{"name": "a", "context": {"cluster": "a", "user": "a"}}],
        "current-context": "a",
    }
    (tmp_path / "config").write_text(yaml.safe_dump(configuration))
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "config"))
    # the copy to the claim needs a pod that runs
    monkeypatch.setattr(kubeflow._Executor, "copy_to_workspace", lambda *_, **__: None)
    monkeypatch.setattr(kubeflow.shutil, "which", lambda name: name)
    yield kind
    server.shutdown()
    server.server_close()


def test_a_job_on_kubernetes_is_created_observed_and_deleted(objects: type[Objects], tmp_path: Path) -> None:
    profile = filled_in("kubernetes", ["kubernetes.queue=training"])
    files = files_of("recipes.demo:tiny_moe", profile)
    names = [pods.submit(files, profile, tmp_path) for _ in range(2)]  # the second one finds the TrainingRuntime
    assert len(set(names)) == 2
    runtime, *jobs = objects.stored
    assert objects.stored[runtime]["metadata"]["resourceVersion"] == "2"
    assert runtime == f"{TRAINER}/trainingruntimes/minpro-demo"
    assert jobs == [f"{TRAINER}/trainjobs/{name}" for name in names]
    sent = objects.stored[jobs[0]]["spec"]
    assert "podTemplateOverrides" not in sent
    assert sent["runtimeRef"]["name"] == "minpro-demo"
    record = JobRecord(
        name="demo", job_id=names[0], run_dir="/r", log_folder="/l", submitted_at=1.0, executor="kubernetes",
        namespace="rl",
    )  # fmt: skip
    states = {"active": "RUNNING", "succeeded": "COMPLETED", "failed": "FAILED"}
    seen = [pods.look_up(record).state]
    for counted in states:
        objects.stored[jobs[0]]["status"] = {"jobsStatus": [{"name": "node", counted: 1}]}
        seen.append(pods.look_up(record).state)
    assert seen == ["PENDING", *states.values()]
    pods.cancel(record)
    assert jobs[0] not in objects.stored
    with pytest.raises(JobError, match=f"no TrainJob {names[0]} in namespace rl"):
        pods.look_up(record)


def test_the_words_of_kubernetes_are_reported(objects: type[Objects], tmp_path: Path) -> None:
    objects.refuses = 403
    profile = filled_in("kubernetes", [])
    with pytest.raises(UserError, match=r"Kubernetes answers 403 .*admission webhook: no such queue"):
        pods.submit(files_of("recipes.demo:tiny_moe", profile), profile, tmp_path)


def test_no_configuration_of_kubectl_is_named(
    objects: type[Objects], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kubernetes.config import kube_config

    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    profile = filled_in("kubernetes", [])
    with pytest.raises(UserError, match=r"executor = kubernetes: .*`kubectl cluster-info` must reach the cluster"):
        pods.submit(files_of("recipes.demo:tiny_moe", profile), profile, tmp_path)


@pytest.mark.parametrize("recipe", [recipe for executor, recipe in CASES if executor == "kubernetes"])
def test_the_pods_have_only_fields_that_kubernetes_knows(recipe: str) -> None:
    client = pytest.importorskip("kubernetes.client")
    stored = stored_file("kubernetes", recipe).read_text().split("# the script of each node")[0]
    runtime, train_job = yaml.safe_load_all(stored)
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert list(unknown_fields(client, job["template"], "V1JobTemplateSpec")) == []
    trainer = train_job["spec"]["trainer"]
    container = {"name": "node", "env": trainer["env"], "command": trainer["command"]}
    container["resources"] = trainer.get("resourcesPerNode", {})
    assert list(unknown_fields(client, container, "V1Container")) == []
    assert list(unknown_fields(client, {"containers": [{"nme": "a"}]}, "V1PodSpec")) == ["V1Container.nme"]


def unknown_fields(client: Any, value: Any, kind: str) -> Iterator[str]:
    """The fields that the class `kind` of Kubernetes' client, or a class inside it, does not have."""
    if kind.startswith("list["):
        for one in value:
            yield from unknown_fields(client, one, kind[5:-1])
        return
    known = getattr(client, kind, None)
    if known is None:  # a text, a number, or a map of them
        return
    types = {known.attribute_map[name]: of for name, of in known.openapi_types.items()}
    for name, inner in value.items():
        if name not in types:
            yield f"{kind}.{name}"
        else:
            yield from unknown_fields(client, inner, types[name])


@pytest.mark.parametrize("recipe", [recipe for executor, recipe in CASES if executor == "skypilot"])
def test_skypilot_accepts_the_task(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sky = pytest.importorskip("sky")
    monkeypatch.chdir(tmp_path)
    described = (FOLDER / f"skypilot_{recipe}.txt").read_text().split("# the script of each node")[0]
    content = yaml.safe_load(described)
    for folder in content["file_mounts"].values():
        (tmp_path / folder).mkdir()
    task = sky.Task.from_yaml_config(content)
    task.validate_name()
    (resources,) = task.resources
    assert resources.job_recovery["recover_on_exit_codes"] == [75]
    assert resources.job_recovery["max_restarts_on_errors"] == 0
    assert task.num_nodes == yaml.safe_load(described)["num_nodes"]


def test_skypilot_adds_the_claim_to_its_own_volumes() -> None:
    pytest.importorskip("sky")
    from sky.utils import config_utils

    content = yaml.safe_load(stored_file("skypilot", "qwen3_30b_a3b").read_text().split("# the script")[0])
    shared = {"name": "dshm", "emptyDir": {"medium": "Memory"}}
    own = {
        "spec": {
            "volumes": [shared],
            "containers": [{"name": "ray-node", "volumeMounts": [{"name": "dshm", "mountPath": "/dev/shm"}]}],
        }
    }
    config_utils.merge_k8s_configs(own, content["config"]["kubernetes"]["pod_config"])
    (container,) = own["spec"]["containers"]
    assert [volume["name"] for volume in own["spec"]["volumes"]] == ["dshm", "workspace"]
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/dev/shm", "/workspace/minpro"}  # type: ignore[index]


@pytest.mark.parametrize("launched", [3, [3]])
def test_a_job_of_skypilot_is_launched_observed_and_cancelled(
    launched: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the calls of SkyPilot's client, and answers in its types; older versions return the number alone."""
    sky = pytest.importorskip("sky")
    pytest.importorskip("nemo_run")
    from sky.jobs.client import sdk
    from sky.jobs.state import ManagedJobStatus
    from sky.schemas.api.responses import ManagedJobRecord

    sent: list[Any] = []
    states = {"STARTING": "PENDING", "RECOVERING": "PENDING", "RUNNING": "RUNNING", "SUCCEEDED": "COMPLETED",
              "FAILED": "FAILED", "FAILED_NO_RESOURCE": "FAILED", "CANCELLED": "CANCELLED"}  # fmt: skip
    queue: list[ManagedJobRecord] = []
    monkeypatch.setattr(sky, "stream_and_get", lambda answer: answer)
    monkeypatch.setattr(sdk, "launch", lambda task: sent.append(task) or (launched, None))
    monkeypatch.setattr(sdk, "queue", lambda **_: queue)
    monkeypatch.setattr(sdk, "cancel", lambda job_ids: sent.append(job_ids))
    profile = filled_in("skypilot", [])
    job = pods.submit(files_of("recipes.demo:tiny_moe", profile), profile, tmp_path / "records")
    assert job == "jobs___minpro-demo___3"
    (folder,) = sent[0].file_mounts.values()
    assert (Path(folder) / "job.sh").is_file()
    record = JobRecord(
        name="demo", job_id=job, run_dir="/r", log_folder="/l", submitted_at=1.0, executor="skypilot"
    )  # fmt: skip
    with pytest.raises(JobError, match="SkyPilot does not know the managed job 3: sky jobs queue"):
        pods.look_up(record)
    for word, state in states.items():
        queue[:] = [ManagedJobRecord(job_id=3, status=ManagedJobStatus[word], recovery_count=2)]
        seen = pods.look_up(record)
        assert (seen.state, seen.restarts) == (state, 2)
    pods.cancel(record)
    assert sent[-1] == [3]
