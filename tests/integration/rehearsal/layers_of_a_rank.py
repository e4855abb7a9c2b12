"""Prints what the layers of a rank are, as JSON: with Transformer Engine's own Python, or with the tests' stand-in.

    python -m tests.integration.rehearsal.layers_of_a_rank (package|stand_in) RECIPE

The modules are built as a rehearsal builds them: by the trainer's code and Megatron's wrappers, on fake CUDA tensors.
"""

import inspect
import json
import sys
from typing import Any

from minpro_megatron.launch.recipe import load_recipe
from minpro_megatron.rehearsal import rank
from minpro_megatron.rehearsal.subject import Rehearsed
from tests.mesh import transformer_engine_stand_in

CLASSES = ("Linear", "LayerNormLinear", "GroupedLinear", "RMSNorm", "DotProductAttention")
# of parameters, which Megatron's optimizer, its reduction of gradients and its checkpoints read
MARKS = ("tensor_model_parallel", "partition_dim", "partition_stride", "sequence_parallel", "allreduce")


def main(source: str, recipe: str) -> None:
    found: dict[str, Any] = {}

    def only_build(what: Rehearsed, architecture: Any, observer: Any) -> None:
        from minpro_megatron.actor.model import DTYPES, build_model, features_of
        from minpro_megatron.rehearsal.fake_mesh import open_fake_mesh

        device, backends = rank.cuda_without_driver.DEVICE, observer.collectives.backends
        mesh = open_fake_mesh(what.config.parallel, device, what.config.seed, what.rank, backends)
        (chunk,) = build_model(architecture, mesh, DTYPES[what.config.model.dtype], features_of(what.config))
        found["parameters"] = {name: _described(parameter) for name, parameter in chunk.named_parameters()}
        found["state"] = sorted(chunk.state_dict())

    replaced: Any = rank
    if source == "stand_in":
        replaced.transformer_engine = transformer_engine_stand_in
    replaced._run_phases = only_build
    done = rank.rehearse_rank(Rehearsed(recipe, load_recipe(recipe), rank=0, layers=1))
    import transformer_engine.pytorch as modules

    found["problems"] = done.problems
    found["signatures"] = {name: _signatures(getattr(modules, name)) for name in CLASSES}
    print(json.dumps(found))


def _described(parameter: Any) -> dict[str, Any]:
    marks = {mark: getattr(parameter, mark, None) for mark in MARKS}
    return {"shape": list(parameter.shape), "dtype": str(parameter.dtype), "device": str(parameter.device)} | marks


def _signatures(kind: Any) -> dict[str, dict[str, str]]:
    """The parameters of constructor and forward pass with their defaults."""
    return {
        name: {
            one.name: "" if one.default is one.empty else repr(one.default)
            for one in inspect.signature(getattr(kind, name)).parameters.values()
            if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL) and one.name != "self"
        }
        for name in ("__init__", "forward")
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
