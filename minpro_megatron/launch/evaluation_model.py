"""Exports a run's checkpoint for an evaluation, because servers need a Hugging Face folder."""

from dataclasses import replace
from pathlib import Path

from minpro_megatron.checkpoints.manifest import is_run_checkpoint
from minpro_megatron.checkpoints.run_checkpoint import EXPORTED_FROM, is_exported_from, texts_of_run
from minpro_megatron.errors import UserError
from minpro_megatron.launch.evaluation_options import EvaluationOptions
from minpro_megatron.monitor.byte_progress import byte_progress

MODEL_FOLDER = "model"


def with_hf_model(options: EvaluationOptions) -> EvaluationOptions:
    """`options` with a Hugging Face folder as the model. A run's checkpoint is written to OUTPUT/model once. With
    external servers, which have the weights, only config and tokenizer of the run's model are used.

    Raises UserError for a damaged checkpoint, or an output of another checkpoint.
    """
    checkpoint = Path(options.model)
    if not is_run_checkpoint(checkpoint):
        return options
    if options.settings.get("server.urls"):
        return replace(options, model=str(texts_of_run(checkpoint)))
    folder = options.output / MODEL_FOLDER
    if not is_exported_from(folder, checkpoint):
        if (folder / EXPORTED_FROM).exists():
            raise UserError(
                f"--output {options.output}: it contains the evaluation of another checkpoint (see "
                f"{folder / EXPORTED_FROM}); give another --output"
            )
        from minpro_megatron.conversion.convert import (
            to_hf,
        )  # imports torch, which takes seconds, only for a checkpoint

        to_hf(checkpoint, folder, byte_progress)
    return replace(options, model=str(folder))
