"""A Slurm of two nodes on this machine: munged, slurmctld and two slurmd, with everything in one folder."""

import getpass
import os
import shutil
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
NODES = ("node1", "node2")
# No accounting, as on many small clusters. cred_expire: a requeued job waits for its old credentials to expire.
_CONFIG = """\
ClusterName=local
SlurmctldHost=localhost(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPort={first_port}
StateSaveLocation={folder}/ctld
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
KillWait=15
NodeName=node1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={node1_port} CPUs=8 RealMemory=1000 State=UNKNOWN
NodeName=node2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={node2_port} CPUs=8 RealMemory=1000 State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:8
"""


def missing_programs() -> list[str]:
    """What a local Slurm needs and this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=_search_path()) is None]


def _search_path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class LocalSlurm:
    """The four daemons, from `start` to `stop`; `environment` is what a client of this cluster needs."""

    def __init__(self, folder: Path, first_port: int) -> None:
        self._folder = folder
        ports = {"first_port": first_port, "node1_port": first_port + 1, "node2_port": first_port + 2}
        for name in ("ctld", *(f"spool/{node}" for node in NODES)):
            (folder / name).mkdir(parents=True)
        (folder / "slurm.conf").write_text(_CONFIG.format(folder=folder, user=getpass.getuser(), **ports))
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _search_path()}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Returns when both nodes are idle."""
        key, socket = self._folder / "munge.key", self._folder / "munge.socket"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        munge_files = [f"--{name}={self._folder}/munge.{name[:4]}" for name in ("log-file", "pid-file", "seed-file")]
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={socket}", *munge_files)
        self._wait(socket.exists, "munged")
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        self._wait(self._is_idle, "two idle nodes")

    def run(self, *command: str) -> str:
        """What a client's command prints. Raises CalledProcessError."""
        environment = os.environ | self.environment
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=30).stdout

    def stop(self) -> None:
        """Ends the daemons, those that run jobs first. Jobs have ended before."""
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _daemon(self, *command: str) -> None:
        with (self._folder / f"{command[0]}-{len(self._daemons)}.out").open("wb") as out:
            environment = os.environ | self.environment
            self._daemons.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))

    def _is_idle(self) -> bool:
        try:
            return self.run("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * len(NODES)
        except subprocess.CalledProcessError:
            return False

    def _wait(self, holds: object, what: str, limit_s: float = 30) -> None:
        deadline = time.monotonic() + limit_s
        assert callable(holds)
        while not holds():
            for daemon in self._daemons:
                assert daemon.poll() is None, f"{daemon.args}: {self._logs()}"
            assert time.monotonic() < deadline, f"{what} not within {limit_s:g} s: {self._logs()}"
            time.sleep(0.1)

    def _logs(self) -> str:
        files = [*self._folder.glob("*.log"), *self._folder.glob("*.out")]
        return "\n".join(f"{path.name}: {path.read_text(errors='replace')[-1500:]}" for path in files)


# As little of everything as makes a run; sampled one by one, so that nothing depends on the machine's load.
SMALL_RUN = (
    "server.engine=reference", "server.start_timeout_s=150", "num_global_steps=2", "batch.num_prompts=4",
    "batch.mini_batch_prompts=2", "evaluation.num_prompts=2", "evaluation.samples_per_prompt=1", "parallel.tensor=1",
    "parallel.expert=1",
)  # fmt: skip
