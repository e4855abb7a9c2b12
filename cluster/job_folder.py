"""The folder that a job on Kubernetes or with SkyPilot gets: the script of its nodes, its settings and its code."""

import tarfile
from pathlib import Path

from minpro_megatron.cluster.job_files import JobFiles, archive_code
from minpro_megatron.cluster.job_script import CODE_FOLDER, SCRIPT_FILE, job_script
from minpro_megatron.cluster.profile import Profile


def write_job_folder(folder: Path, files: JobFiles, profile: Profile) -> None:
    """Writes script, settings and code into the new `folder`."""
    (folder / CODE_FOLDER).mkdir(parents=True)
    for name, text in (files.configs | {SCRIPT_FILE: job_script(profile, files.num_nodes)}).items():
        (folder / name).write_text(text, encoding="utf-8")
    archive = folder / "code.tar.gz"
    archive_code(archive)
    with tarfile.open(archive) as tar:
        tar.extractall(folder / CODE_FOLDER, filter="fully_trusted")  # written by this process
    archive.unlink()
