"""The script that each node of a job on Kubernetes or with SkyPilot runs, where srun does not start the nodes.

Both end a job, or start all of its nodes again, by the exit status of a node. This script gives them 75 for another
start, and any other status for the end of the job. It decides as the script of a Slurm job does (cluster/nemo.py).
"""

import shlex
from pathlib import PurePosixPath

from minpro_megatron.cluster.job_files import RUN_FILE, TOPOLOGY_FILE
from minpro_megatron.cluster.profile import Profile
from minpro_megatron.errors import TO_BE_CONTINUED
from minpro_megatron.launch.job_status import EXIT_STATUS_VARIABLE, STATED

SCRIPT_FILE, CODE_FOLDER = "job.sh", "code"
# Variables of a pod that Kubernetes fills in from the pod's labels, which JobSet sets (cluster/kubeflow.py).
JOB_VARIABLE, RESTARTS_VARIABLE = "MINPRO_JOB", "MINPRO_JOB_RESTARTS"
# Port of the head node where SkyPilot's nodes agree on the name of a start; it is closed before the roles start.
AGREEMENT_PORT = 29431

# `job`: the name of the job, the same for all of its starts; `index`: this node, from 0.
_FACTS = {
    "kubernetes": f"""\
job=${JOB_VARIABLE}
index=$JOB_COMPLETION_INDEX
""",
    "skypilot": """\
job=${SKYPILOT_TASK_ID//[^A-Za-z0-9_.-]/_}
index=$SKYPILOT_NODE_RANK
""",
}
# `start`: the name of this start, the same on all nodes and new for each start.
_START = {
    "kubernetes": f"""\
start=$job-${RESTARTS_VARIABLE}
""",
    # SkyPilot gives all starts of a job the same name and does not number them.
    "skypilot": """\
head=$(head -n 1 <<<"$SKYPILOT_NODE_IPS")
number=$("$python" -m minpro_megatron.parallel.start_number --index "$index" --nodes "$nodes" --head "$head:PORT") ||
    end_with $?
start=$job-$number
""",
}
_SCRIPT = """\
#!/bin/bash
# One node of a job. Exit status 75: the job is to be started again; any other: the job has ended.
set -u
folder=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
workspace=@WORKSPACE@
states=@STATES@
python=@PYTHON@
nodes=@NODES@
restarts=@RESTARTS@
start=
@FACTS@
@ENVIRONMENT@
# $1: the status of this node's roles. When a node fails, the others fail too: the statuses that decide are in files.
end_with() {
    local status=$1 stated failed
    for stated in @STATED@; do
        if [ -n "$start" ] && [ -e "$@EXIT_STATUS@.$stated" ]; then
            exit "$stated"
        fi
    done
    case $status in
        0 | @STATED_PATTERN@) exit "$status" ;;
    esac
    mkdir -p "$states/$job.failed"
    touch "$states/$job.failed/${start:-unnamed-$(date +%s)}"
    failed=$(find "$states/$job.failed" -type f | wc -l)
    if [ "$failed" -le "$restarts" ]; then
        echo "exit status $status: to be started again; failed starts: $failed, restarts = $restarts in the profile"
        exit @AGAIN@
    fi
    echo "exit status $status: not started again; failed starts: $failed, restarts = $restarts in the profile"
    exit "$status"
}

if [ ! -d "$workspace" ]; then
    echo "error: workspace = $workspace is not a folder on this node: mount the shared file system there" >&2
    exit 2
fi
mkdir -p "$states"
@SECRETS@cd -- "$folder/@CODE@" || exit 2
export PYTHONPATH=$folder/@CODE@
@START@export @EXIT_STATUS@=$states/$start

# This script is process 1 of a pod: it hands on the signal that announces the pod's end, and waits.
"$python" -m minpro_megatron @ARGUMENTS@ \\
    --job "$job" --start "$start" --index "$index" &
node=$!
trap 'kill -TERM "$node" 2>/dev/null' TERM
wait "$node"
status=$?
while kill -0 "$node" 2>/dev/null; do
    wait "$node"
    status=$?
done
end_with "$status"
"""


def job_script(profile: Profile, num_nodes: int) -> str:
    """The script of each node, with the profile's environment. Secrets are read from the profile's secrets_file, which
    is on the shared file system, and are not in the script."""
    states = str(PurePosixPath(profile.jobs_folder) / "states")
    secrets = f". {shlex.quote(profile.secrets_file)} || exit 2\n" if profile.secrets_file else ""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in sorted(profile.environment.items())]
    values = {
        "FACTS": _FACTS[profile.executor],
        "START": _START[profile.executor].replace("PORT", str(AGREEMENT_PORT)),
        "WORKSPACE": shlex.quote(profile.workspace),
        "STATES": shlex.quote(states),
        "PYTHON": shlex.quote(profile.python),
        "NODES": str(num_nodes),
        "RESTARTS": str(profile.restarts),
        "ENVIRONMENT": "".join(f"{line}\n" for line in ["export PYTHONUNBUFFERED=1", *exports]),
        "STATED_PATTERN": " | ".join(map(str, STATED)),
        "STATED": " ".join(map(str, STATED)),
        "EXIT_STATUS": EXIT_STATUS_VARIABLE,
        "AGAIN": str(TO_BE_CONTINUED),
        "SECRETS": secrets,
        "CODE": CODE_FOLDER,
        "ARGUMENTS": " ".join(_arguments(profile)),
    }
    script = _SCRIPT
    for name, value in values.items():
        script = script.replace(f"@{name}@", value)
    return script


def _arguments(profile: Profile) -> list[str]:
    """The options of `node` that do not depend on the node, each as a word of the script."""
    files = ["--config", f'"$folder/{RUN_FILE}"', "--topology", f'"$folder/{TOPOLOGY_FILE}"']
    if profile.executor == "kubernetes":
        interface, end_early_s = profile.kubernetes.interface, profile.kubernetes.grace_s
    else:
        interface, end_early_s = profile.skypilot.interface, 0
    early = ["--end-early-s", str(end_early_s)] if end_early_s else []
    return ["node", *files, *early, *(["--interface", shlex.quote(interface)] if interface else [])]
