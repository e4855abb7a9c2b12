"""A Megatron checkpoint on a mesh beside the Hugging Face model from which it was made: from options to differences."""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minpro_megatron.checkpoints.manifest import check_architecture, read_manifest
from minpro_megatron.config.mesh_option import parallel_config
from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.errors import SUCCEEDED, UserError
from minpro_megatron.launch.launcher import closing_lines
from minpro_megatron.launch.preflight.gpu_count import count_gpus
from minpro_megatron.launch.roles import torchrun, trainer_environment
from minpro_megatron.launch.supervisor import RoleCommand, Supervisor
from minpro_megatron.model_comparison.job import ERROR, JOB, PROGRESS, RESULT
from minpro_megatron.models.architecture import read_architecture, refuse_uneven_cuts
from minpro_megatron.models.model_files import max_positions

if TYPE_CHECKING:
    import numpy as np

MAX_LOGITS = 1 << 28  # of one sequence, held by every rank and here: 1 GiB
# The largest mean KL divergence of two computations of the same weights, by data type. In float32 the divergences of
# equal weights are below 1e-8, and one wrong tensor of the tiny model gives more than 1e-3
# (tests/e2e/test_compare_logits.py). The limit of bfloat16, whose rounding is 2^16 times coarser, has not been
# measured on a GPU.
MAX_MEAN_KL = {"float32": 1e-6, "bfloat16": 1e-2}


@dataclass(frozen=True)
class Comparison:
    """Over all positions of all sequences; `kl` is in nats. `agrees`: the mean divergence is within the limit for the
    data type in which both were computed."""

    tokens: int
    largest_difference: float
    mean_difference: float
    top_1_agreement: float
    mean_kl: float
    largest_kl: float
    dtype: str
    agrees: bool


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions:
    """The options of the command line."""

    hf: Path
    megatron: Path | None
    parallel: str
    text: Sequence[str]
    ids: Sequence[str]
    dtype: str
    backend: str


def run_comparison(options: ComparisonOptions, tell: Callable[[str], None]) -> Comparison:
    """Computes the logits on a mesh of ranks, which are started here, and in this process. `tell` gets a line for each
    stage. Raises UserError if the models cannot be compared."""
    architecture = read_architecture(options.hf)
    config = parallel_config(options.parallel)
    refuse_uneven_cuts(architecture, config)
    if options.megatron:
        check_architecture(options.megatron, read_manifest(options.megatron), architecture)
    sequences = token_sequences(options.hf, options.text, options.ids, architecture.vocab_size)
    device = "cuda" if count_gpus() >= config.world_size else "cpu"
    dtype = options.dtype if device == "cuda" else "float32"
    job = {
        "hf": str(options.hf.absolute()),
        "megatron": str(options.megatron.absolute()) if options.megatron else None,
        "parallel": config.model_dump(),
        "device": device,
        "dtype": dtype,
        "backend": options.backend,
        "sequences": sequences,
    }
    tell(f"starting {config.world_size} Megatron ranks ({device}, {dtype}) for {len(sequences)} sequences")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / JOB).write_text(json.dumps(job))
        _run_ranks(work, config, device, tell)
        from safetensors.numpy import load_file

        found = load_file(work / RESULT)
    tell("computing the same logits with transformers")
    expected = hf_logits(options.hf, dtype, sequences, device)
    return compare(expected, [found[str(index)] for index in range(len(sequences))], dtype)


def compare(expected: "list[np.ndarray]", found: "list[np.ndarray]", dtype: str) -> Comparison:
    """The comparison of logits [tokens, vocabulary], sequence by sequence."""
    import numpy as np
    import torch

    one, other = (torch.from_numpy(np.concatenate(logits)).double() for logits in (expected, found))
    difference = (one - other).abs()
    log_p, log_q = one.log_softmax(-1), other.log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    mean_kl = float(divergence.mean())
    return Comparison(
        tokens=len(one),
        largest_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        top_1_agreement=float((one.argmax(-1) == other.argmax(-1)).double().mean()),
        mean_kl=mean_kl,
        largest_kl=float(divergence.max()),
        dtype=dtype,
        agrees=mean_kl <= MAX_MEAN_KL[dtype],
    )


def hf_logits(hf: Path, dtype: str, sequences: list[list[int]], device: str) -> "list[np.ndarray]":
    """The logits [tokens, vocabulary] of each sequence by transformers."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(hf, dtype=getattr(torch, dtype))
    model.to(device)
    with torch.no_grad():
        return [model(torch.tensor([ids], device=device)).logits[0].float().cpu().numpy() for ids in sequences]


def token_sequences(hf: Path, texts: Sequence[str], ids: Sequence[str], vocab_size: int) -> list[list[int]]:
    """The token ids of --text and --ids. Raises UserError if one is too short, too long or has an invalid token."""
    sequences: list[list[int]] = []
    for text in ids:
        try:
            sequences.append([int(part) for part in text.split(",")])
        except ValueError:
            raise UserError(f"--ids {text}: give token ids with commas between them, such as 12,7,40") from None
    if texts:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(hf)
        sequences = [*(tokenizer(text)["input_ids"] for text in texts), *sequences]
    if not sequences:
        raise UserError("there are no sequences to compare: give --text or --ids")
    limit = min(MAX_LOGITS // vocab_size, max_positions(hf) or MAX_LOGITS)
    for sequence in sequences:
        wrong = [token for token in sequence if not 0 <= token < vocab_size]
        if wrong:
            raise UserError(f"token {wrong[0]}: the model's tokens are 0 to {vocab_size - 1}")
        if not 2 <= len(sequence) <= limit:
            raise UserError(
                f"a sequence of {len(sequence)} tokens: give 2 to {limit} (max_position_embeddings of the model, or "
                f"{MAX_LOGITS} logits)"
            )
    return sequences


def _run_ranks(work: Path, config: ParallelConfig, device: str, tell: Callable[[str], None]) -> None:
    """Runs every rank of the mesh. Raises UserError with the error of a rank."""
    environment = dict(os.environ) | {"PYTHONUNBUFFERED": "1"} | trainer_environment(device)
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    ranks = [*torchrun(config.world_size), "-m", "minpro_megatron.model_comparison.ranks", str(work)]
    told = ""

    def tell_progress() -> None:
        nonlocal told
        now = (work / PROGRESS).read_text() if (work / PROGRESS).exists() else ""
        if now and now != told:
            told = now
            tell(now)

    outcome = Supervisor([RoleCommand("compare", ranks, environment)], work).run(tell_progress)
    if outcome.status != SUCCEEDED:
        log = work / "compare.log"
        message = (work / ERROR).read_text() if (work / ERROR).exists() else log.read_text() if log.exists() else ""
        raise UserError(message.strip().splitlines()[-12:] or closing_lines(outcome))


def to_standard_error(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
