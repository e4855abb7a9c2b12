"""Compare a Megatron checkpoint on a mesh with the Hugging Face model from which it was made, logit by logit.

    python tools/compare_logits.py --hf DIR [--megatron DIR] [--parallel tensor=2,pipeline=2] \\
        (--text TEXT | --ids 12,7,40) ... [--dtype bfloat16] [--backend auto] [--json]

Both read the same tokens; without --megatron the mesh loads the Hugging Face weights itself. The output is, over all
positions of all sequences: the largest and the mean difference of logits, how often the highest logit belongs to the
same token, and the mean and largest KL divergence (Hugging Face || Megatron) of the next token, in nats. This command
starts the ranks: on GPUs if there is one for every rank, else on the CPU in float32.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file, save_file

# megatron-core logs at import every optional package that is not installed.
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)

from minpro_megatron.actor.logits import sequence_logits
from minpro_megatron.actor.model import DTYPES, ModelFeatures, build_model
from minpro_megatron.checkpoints.converted_model import load_weights
from minpro_megatron.command_line import tool_parser
from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.errors import ProjectError, UserError, run_reporting
from minpro_megatron.launch.launcher import closing_lines
from minpro_megatron.launch.preflight.run_checks import count_gpus
from minpro_megatron.launch.roles import torchrun, trainer_environment
from minpro_megatron.launch.supervisor import FINISHED, RoleCommand, Supervisor
from minpro_megatron.models.architecture import read_architecture, refuse_uneven_cuts
from minpro_megatron.models.model_files import max_positions
from minpro_megatron.parallel.mesh import open_mesh
from minpro_megatron.replay.settings import parse_parallel
from minpro_megatron.weights.hf_files import HfReader
from minpro_megatron.weights.local import load_hf_tensors

logging.disable(logging.NOTSET)  # programs that import this file keep their own logging

JOB, RESULT, ERROR = "job.json", "logits.safetensors", "error.txt"
MAX_LOGITS = 1 << 28  # of one sequence, held by every rank and here: 1 GiB


@dataclass(frozen=True)
class Comparison:
    """Over all positions of all sequences; `kl` is in nats."""

    tokens: int
    largest_difference: float
    mean_difference: float
    top_1_agreement: float
    mean_kl: float
    largest_kl: float


def compare(expected: list[np.ndarray], found: list[np.ndarray]) -> Comparison:
    """The comparison of logits [tokens, vocabulary], sequence by sequence."""
    one, other = (torch.from_numpy(np.concatenate(logits)).double() for logits in (expected, found))
    difference = (one - other).abs()
    log_p, log_q = one.log_softmax(-1), other.log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    return Comparison(
        tokens=len(one),
        largest_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        top_1_agreement=float((one.argmax(-1) == other.argmax(-1)).double().mean()),
        mean_kl=float(divergence.mean()),
        largest_kl=float(divergence.max()),
    )


@torch.no_grad()
def hf_logits(hf: Path, dtype: str, sequences: list[list[int]], device: str) -> list[np.ndarray]:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(hf, dtype=DTYPES[dtype])
    model.to(device)
    return [model(torch.tensor([ids], device=device)).logits[0].float().cpu().numpy() for ids in sequences]


def token_sequences(hf: Path, texts: list[str], ids: list[str], vocab_size: int) -> list[list[int]]:
    """The token ids of --text and --ids. Raises UserError if one is too short, too long or has an invalid token."""
    sequences = []
    if texts:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(hf)
        sequences += [tokenizer(text)["input_ids"] for text in texts]
    for text in ids:
        try:
            sequences.append([int(part) for part in text.split(",")])
        except ValueError:
            raise UserError(f"--ids {text}: give token ids with commas between them, such as 12,7,40") from None
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


def run_ranks(work: Path, config: ParallelConfig, device: str) -> None:
    """Runs this file as every rank of the mesh. Raises UserError with the error of a rank."""
    environment = dict(os.environ) | {"PYTHONUNBUFFERED": "1"} | trainer_environment(device)
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = RoleCommand("compare", [*torchrun(config.world_size), __file__, "--ranks-of", str(work)], environment)
    outcome = Supervisor([command], work).run(lambda: None)
    if outcome.status != FINISHED:
        log = work / "compare.log"
        message = (work / ERROR).read_text() if (work / ERROR).exists() else log.read_text() if log.exists() else ""
        raise UserError(message.strip().splitlines()[-12:] or closing_lines(outcome))


def rank_main(work: Path) -> int:
    job = json.loads((work / JOB).read_text())
    config = ParallelConfig(**job["parallel"])
    architecture = read_architecture(job["hf"])
    with open_mesh(config, job["device"], seed=0) as mesh:
        if job["device"] == "cpu":
            torch.set_num_threads(1)  # the ranks run in parallel
        try:
            chunks = build_model(architecture, mesh, DTYPES[job["dtype"]], ModelFeatures(backend=job["backend"]))
            if job["megatron"]:
                load_weights(chunks, architecture, job["megatron"], mesh)
            else:
                load_hf_tensors(chunks, architecture, mesh, HfReader(job["hf"]))
        except ProjectError as error:
            (work / ERROR).write_text(str(error))
            return 1
        sequences = [np.array(ids, np.int32) for ids in job["sequences"]]
        found = [sequence_logits(chunks, mesh, architecture.vocab_size, ids) for ids in sequences]
        if mesh.rank == 0:
            save_file({str(index): logits for index, logits in enumerate(found)}, work / RESULT)
    return 0


def run(options: argparse.Namespace) -> Comparison:
    """Raises UserError if the models cannot be compared."""
    try:
        architecture = read_architecture(options.hf)
        config = ParallelConfig(**parse_parallel(options.parallel))
        refuse_uneven_cuts(architecture, config)
    except ValidationError as error:
        raise UserError(f"--parallel {options.parallel}: {one['msg']}" for one in error.errors()) from None
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
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / JOB).write_text(json.dumps(job))
        run_ranks(work, config, device)
        found = load_file(work / RESULT)
    expected = hf_logits(options.hf, dtype, sequences, device)
    return compare(expected, [found[str(index)] for index in range(len(sequences))])


def main() -> int:
    parser = tool_parser(__doc__)
    parser.add_argument("--hf", type=Path, help="Hugging Face model folder")
    parser.add_argument("--megatron", type=Path, help="converted model, or a run's checkpoint")
    parser.add_argument("--parallel", default="", metavar="AXIS=N,...", help="the mesh (default: one rank)")
    parser.add_argument("--text", action="append", default=[], help="repeatable")
    parser.add_argument("--ids", action="append", default=[], metavar="ID,ID,...", help="repeatable")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16", help="on GPUs (default: bfloat16)")
    backends = ["auto", "transformer_engine", "torch"]
    parser.add_argument("--backend", choices=backends, default="auto", help="as model.backend (default: auto)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--ranks-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ranks_of:
        return rank_main(options.ranks_of)
    if options.hf is None:
        parser.error("--hf is required")
    return run_reporting(lambda: _compare(options), "compare_logits")


def _compare(options: argparse.Namespace) -> int:
    comparison = run(options)
    if options.json:
        print(json.dumps(asdict(comparison), indent=2))
        return 0
    table = Table(box=SIMPLE, show_header=False)
    for name, value in asdict(comparison).items():
        table.add_row(name.replace("_", " "), f"{value:.6g}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
