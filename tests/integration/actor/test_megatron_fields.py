"""The fields that model.megatron, optimizer.megatron and parallel.ddp give reach Megatron-Core's own classes, and no
field of a setting can be given a second value there."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from minpro_megatron.actor.backends.torch_backend import TorchLayers
from minpro_megatron.actor.library_fields import field_values
from minpro_megatron.actor.megatron_configs import ddp_config, optimizer_config
from minpro_megatron.actor.model import ModelFeatures, transformer_config
from minpro_megatron.actor.settings_check import megatron_problems
from minpro_megatron.config.library_settings import owners
from minpro_megatron.config.optimizer import OptimizerConfig as OptimizerSettings
from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.config.run import with_overrides
from minpro_megatron.errors import UserError
from minpro_megatron.models.known_models.find import find_architecture
from tests.support.run_examples import example_config, write_example_files

# given by the project, and for the user to replace
REPLACEABLE = {"moe_router_dtype"}
KINDS = {
    "model.megatron": TransformerConfig,
    "optimizer.megatron": OptimizerConfig,
    "parallel.ddp": DistributedDataParallelConfig,
}
MIXTURE = find_architecture("qwen3-30b-a3b")


class Recorder:
    """Stands in for a class of Megatron: keeps the names of the fields that it is given."""

    def __init__(self, kind: type) -> None:
        self.kind, self.given = kind, set[str]()

    def __call__(self, **given: Any) -> Any:
        self.given |= given.keys()
        return self.kind(**given)


def recorded(monkeypatch: pytest.MonkeyPatch, module: str, name: str, kind: type) -> Recorder:
    recorder = Recorder(kind)
    monkeypatch.setattr(f"minpro_megatron.actor.{module}.{name}", recorder)
    return recorder


def test_every_field_that_the_project_sets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TorchLayers(torch.device("cpu"))
    monkeypatch.setattr("minpro_megatron.actor.model.field_values", lambda *_: {})
    monkeypatch.setattr("minpro_megatron.actor.megatron_configs.field_values", lambda *_: {})
    models = recorded(monkeypatch, "model", "TransformerConfig", TransformerConfig)
    optimizers = recorded(monkeypatch, "megatron_configs", "MegatronOptimizerConfig", OptimizerConfig)
    buffers = recorded(monkeypatch, "megatron_configs", "DistributedDataParallelConfig", DistributedDataParallelConfig)
    for recompute in ("none", "selective", "full"):
        features = ModelFeatures(recompute, routing_replay=True)
        transformer_config(MIXTURE, ParallelConfig(expert=2), torch.float32, features, backend)
    optimizer_config(OptimizerSettings(cpu_offload=1.0), torch.bfloat16)
    ddp_config(ParallelConfig())
    for dictionary, recorder in zip(KINDS, (models, optimizers, buffers), strict=True):
        assert recorder.given - owners(dictionary).keys() - REPLACEABLE == set()


@pytest.mark.parametrize("dictionary", KINDS)
def test_the_refused_names_are_fields(dictionary: str) -> None:
    assert owners(dictionary).keys() - {field.name for field in fields(KINDS[dictionary])} == set()


def test_given_fields_replace_those_of_the_project() -> None:
    given = {"masked_softmax_fusion": False, "apply_rope_fusion": False, "moe_permute_fusion": False}
    features = ModelFeatures(attention_backend="fused", dispatcher="flex", megatron=given)
    parallel = ParallelConfig(expert=2)
    found = transformer_config(MIXTURE, parallel, torch.float32, features, TorchLayers(torch.device("cpu")))
    assert {name: getattr(found, name) for name in given} == given
    assert found.attention_backend is AttnBackend.fused
    assert (found.moe_token_dispatcher_type, found.moe_flex_dispatcher_backend) == ("flex", "deepep")
    optimizer = optimizer_config(OptimizerSettings(megatron={"pin_cpu_grads": False}), torch.float32)
    assert optimizer.pin_cpu_grads is False
    assert ddp_config(ParallelConfig(ddp={"bucket_size": 1000})).bucket_size == 1000


def test_routers_of_glm_are_not_rounded_as_those_of_qwen3_may_be() -> None:
    rounded, layers = ModelFeatures(megatron={"moe_router_dtype": None}), TorchLayers(torch.device("cpu"))
    assert transformer_config(MIXTURE, ParallelConfig(), torch.bfloat16, rounded, layers).moe_router_dtype is None
    glm = find_architecture("glm-4.5-air")
    with pytest.raises(UserError, match="moe_router_dtype = null: the routers of Glm4MoeForCausalLM would round"):
        transformer_config(glm, ParallelConfig(), torch.bfloat16, rounded, layers)
    assert transformer_config(glm, ParallelConfig(), torch.float32, rounded, layers).moe_router_dtype is None


def test_names_of_dtypes_and_of_enumerations_become_values() -> None:
    assert field_values(OptimizerConfig, "x", {"exp_avg_dtype": "bfloat16"}) == {"exp_avg_dtype": torch.bfloat16}
    assert field_values(TransformerConfig, "x", {"attention_backend": "flash"}) == {
        "attention_backend": AttnBackend.flash
    }
    assert field_values(TransformerConfig, "x", {"moe_layer_freq": [1, 0]}) == {"moe_layer_freq": [1, 0]}


@pytest.mark.parametrize(
    ("assignment", "problem"),
    [
        ("model.megatron.aply_rope_fusion=true", "TransformerConfig has no such field (did you mean apply_rope_fusion"),
        ("model.megatron.bias_activation_fusion=3", "= 3: Input should be a valid boolean; the field's type is bool"),
        ("model.megatron.timers=1", "Input should be callable"),
        ("optimizer.megatron.pin_cpu_grads=yes", 'optimizer.megatron.pin_cpu_grads = "yes": Input should be a valid'),
        ("parallel.ddp.bucket_size=1.5", "the field's type is Optional[int]"),
        # Megatron's own rule about fields that do not go together
        (
            "model.megatron.overlap_moe_expert_parallel_comm=true",
            "model.megatron: Megatron-Core refuses these fields: ",
        ),
    ],
)
def test_what_megatron_does_not_accept_is_a_problem(assignment: str, problem: str, tmp_path: Path) -> None:
    write_example_files(tmp_path)
    (found,) = megatron_problems(with_overrides(example_config(tmp_path), [assignment]))
    assert problem in found
