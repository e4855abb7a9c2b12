"""The files that a job gets: the current code of the checkout, the run's settings and the shares of its nodes."""

import io
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import minpro_megatron
from minpro_megatron import __version__
from minpro_megatron.cluster.paths import CHECKOUT

_PACKAGE = Path(minpro_megatron.__file__).parent
RUN_FILE, TOPOLOGY_FILE = "run.json", "topology.json"


@dataclass(frozen=True, kw_only=True)
class JobFiles:
    """The contents of the job: the run's settings, its nodes, and the name of both."""

    name: str
    run_json: str
    topology_json: str
    num_nodes: int

    @property
    def configs(self) -> dict[str, str]:
        """The text of each file of settings, by its name."""
        return {RUN_FILE: self.run_json, TOPOLOGY_FILE: self.topology_json}


def archive_code(archive: Path) -> None:
    """Writes the code as a compressed tar file, with its revision in the file REVISION."""
    with tarfile.open(archive, "w:gz", compresslevel=3) as tar:
        for file, name in code_files().items():
            tar.add(file, arcname=name, recursive=False)
        revision = revision_of(CHECKOUT).encode()
        entry = tarfile.TarInfo("REVISION")
        entry.size = len(revision)
        tar.addfile(entry, io.BytesIO(revision))


def code_files() -> dict[Path, str]:
    """The files that the job gets, in their current state, and their names in its archive: those of the checkout, or
    those of the installed package."""
    if (CHECKOUT / ".git").exists():
        return {CHECKOUT / name: name for name in files_of(CHECKOUT)}
    files = [path for path in sorted(_PACKAGE.rglob("*")) if path.is_file() and path.suffix != ".pyc"]
    return {path: str(path.relative_to(_PACKAGE.parent)) for path in files}


def files_of(checkout: Path) -> list[str]:
    """The files and links of the checkout that git knows or does not ignore."""
    listed = _git(checkout, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    names = [name for name in sorted(set(listed.split("\0"))) if name]
    return [name for name in names if (checkout / name).is_file() or (checkout / name).is_symlink()]


def revision_of(checkout: Path) -> str:
    """The commit, with "+changes" if the checkout differs from it; of an installed package its version."""
    if not (checkout / ".git").exists():
        return f"minpro-megatron {__version__}\n"
    changed = "+changes" if _git(checkout, "status", "--porcelain") else ""
    return _git(checkout, "rev-parse", "HEAD").strip() + changed + "\n"


def _git(checkout: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=checkout, check=True, capture_output=True, text=True).stdout
