"""One rank of a comparison: builds its part of the model, computes the logits and, as rank 0, writes them.

torchrun ... -m minpro_megatron.model_comparison.ranks WORK_FOLDER
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from minpro_megatron.actor.logits import sequence_logits
from minpro_megatron.actor.model import DTYPES, ModelFeatures, build_model
from minpro_megatron.checkpoints.converted_model import load_weights
from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.errors import ProjectError
from minpro_megatron.files.replacement import replace_file
from minpro_megatron.model_comparison.job import ERROR, JOB, PROGRESS, RESULT
from minpro_megatron.models.architecture import read_architecture
from minpro_megatron.parallel.mesh import open_mesh
from minpro_megatron.weights.hf_files import HfReader
from minpro_megatron.weights.local import load_hf_tensors


def main(work: Path) -> int:
    """0 after the logits of every sequence are written, 1 after an error was written."""
    job = json.loads((work / JOB).read_text())
    config = ParallelConfig(**job["parallel"])
    architecture = read_architecture(job["hf"])
    with open_mesh(config, job["device"], seed=0) as mesh:

        def tell(line: str) -> None:
            if mesh.rank == 0:
                replace_file(work / PROGRESS, line)

        tell("the ranks are connected; loading the weights")
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
        found = []
        for number, ids in enumerate(sequences, 1):
            tell(f"computing the logits of sequence {number} of {len(sequences)} ({len(ids)} tokens)")
            found.append(sequence_logits(chunks, mesh, architecture.vocab_size, ids))
        if mesh.rank == 0:
            save_file({str(index): logits for index, logits in enumerate(found)}, work / RESULT)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
