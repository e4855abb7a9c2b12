"""The command `export`: writes a policy version of a run as a Hugging Face folder."""

from dataclasses import dataclass
from pathlib import Path

from minpro_megatron.checkpoints.manifest import RunManifest
from minpro_megatron.checkpoints.resume_point import CHECKPOINTS, complete_manifests, read_latest
from minpro_megatron.errors import UserError
from minpro_megatron.monitor.byte_progress import byte_progress


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The options of the command `export`. `version`: "best", "last", or a policy version."""

    run: Path
    output: Path
    version: str = "best"
    verify: bool = False


def export(options: ExportOptions) -> int:
    """Writes the Hugging Face folder. Raises UserError if the run has no such checkpoint, or a damaged one."""
    manifest = chosen(options.run, options.version)
    from minpro_megatron.conversion.convert import (
        to_hf,  # imports torch, which takes seconds, after the command line has been validated
    )

    folder = options.run / CHECKPOINTS / manifest.folder_name
    to_hf(folder, options.output, byte_progress, verify=options.verify)
    score = "" if manifest.score is None else f", evaluation score {manifest.score:.4g}"
    print(f"wrote {options.output}: policy version {manifest.policy_version} of {options.run}{score}")
    return 0


def chosen(run_dir: Path, version: str) -> RunManifest:
    """The manifest of the checkpoint that `version` names: "last", from which the run resumes; "best", the one with
    the highest evaluation score, and the newest of several with this score; or the policy version. Raises UserError."""
    field = f"--version {version}"
    checkpoints = run_dir / CHECKPOINTS
    complete = complete_manifests(checkpoints) if checkpoints.is_dir() else ()
    found = {manifest.policy_version: manifest for manifest in complete}
    if not found:
        raise UserError(
            f"--run {run_dir}: no complete checkpoint in {checkpoints}; give the folder of a run that has saved one "
            "(checkpoint.every_steps); the weights of a finished run are in its hf_export, too"
        )
    if version == "last":
        latest = read_latest(run_dir)
        return latest if latest is not None else found[max(found)]
    if version == "best":
        scored = [manifest for manifest in found.values() if manifest.score is not None]
        if not scored:
            raise UserError(f"{field}: none of the checkpoints {_listed(found)} was evaluated; give a version or last")
        return max(scored, key=lambda manifest: (manifest.score, manifest.policy_version))
    if not version.isdecimal():
        raise UserError(f"{field}: give best, last or a policy version, such as {max(found)}")
    if int(version) not in found:
        raise UserError(f"{field}: there is no such checkpoint in {checkpoints}; there are those of {_listed(found)}")
    return found[int(version)]


def _listed(found: dict[int, RunManifest]) -> str:
    return ", ".join(map(str, sorted(found)))
