"""NeMo-Run's tunnels to a cluster."""

from typing import Any

from nemo_run.core.tunnel.client import LocalTunnel, SSHTunnel

from minpro_megatron.cluster.sections import SshSettings


def tunnel(ssh: SshSettings | None, job_dir: str = "") -> Any:
    """A tunnel for the cluster's commands: to this machine, or to its login node."""
    if ssh is None:
        return LocalTunnel(job_dir=job_dir)
    return SSHTunnel(host=ssh.host, user=ssh.user, port=ssh.port, identity=ssh.identity or None, job_dir=job_dir)
