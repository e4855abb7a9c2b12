"""The Megatron-Core model of an architecture on a mesh. The only file that constructs GPTModel."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from minpro_megatron.actor.backends.select import LayerBackend, select_backend
from minpro_megatron.actor.backends.torch_backend import TorchLayers
from minpro_megatron.actor.library_fields import field_values
from minpro_megatron.config.model import RecomputedModule, recomputed_modules
from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import UserError
from minpro_megatron.models.architecture import Architecture, refuse_uneven_cuts
from minpro_megatron.parallel.mesh import Mesh
from minpro_megatron.weights.rotary import inverse_frequencies

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ModelFeatures:
    """Options of a model besides its architecture. They change no global name and no value of the weights."""

    recompute: str = "none"  # these three as in config.model.ModelConfig
    recompute_modules: tuple[RecomputedModule, ...] = ()
    recompute_layers: int = 0
    routing_replay: bool = False
    backend: str = "auto"  # as in config.model.ModelConfig
    attention_backend: str = "auto"  # as in config.model.ModelConfig
    dispatcher: str = "alltoall"  # as in config.parallel.ParallelConfig
    megatron: Mapping[str, Any] = field(default_factory=dict)  # the setting model.megatron


def features_of(config: RunConfig) -> ModelFeatures:
    """The features of the model that a run trains."""
    model = config.model
    return ModelFeatures(
        recompute=model.recompute,
        recompute_modules=model.recompute_modules,
        recompute_layers=model.recompute_layers,
        routing_replay=model.routing_replay != "none",
        backend=model.backend,
        attention_backend=model.attention_backend,
        dispatcher=config.parallel.dispatcher,
        megatron=model.megatron,
    )


PLAIN = ModelFeatures()


def build_model(
    architecture: Architecture, mesh: Mesh, dtype: torch.dtype, features: ModelFeatures = PLAIN
) -> list[GPTModel]:
    """This rank's model chunks (one, or `virtual_pipeline` of them), with uninitialised weights: load some before use.

    Raises ValueError if the mesh cannot divide the architecture, or the backend is not installed.
    """
    refuse_uneven_cuts(architecture, mesh.config)
    backend = select_backend(features.backend, mesh.device, dtype)
    config = transformer_config(architecture, mesh.config, dtype, features, backend)
    chunks = mesh.config.virtual_pipeline
    return [_build_chunk(architecture, mesh, config, backend, chunk if chunks > 1 else None) for chunk in range(chunks)]


def transformer_config(
    architecture: Architecture,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    features: ModelFeatures,
    backend: LayerBackend,
) -> TransformerConfig:
    """Megatron's configuration of the model on a mesh of these degrees; `features.megatron` replaces the values of this
    project. Raises UserError if it does not fit Megatron's class."""
    own = _own_fields(architecture, parallel, dtype, features, backend)
    config = TransformerConfig(**own | field_values(TransformerConfig, "model.megatron", features.megatron))
    _scale_attention(config, architecture)
    if architecture.sigmoid_routing and dtype != torch.float32 and config.moe_router_dtype is None:
        raise UserError(
            f"model.megatron.moe_router_dtype = null: the routers of {architecture.name} would round their logits to "
            "model.dtype, which those of the servers do not; remove the setting"
        )
    return config


def _own_fields(
    architecture: Architecture,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    features: ModelFeatures,
    backend: LayerBackend,
) -> dict[str, Any]:
    return dict(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.head_dim,
        ffn_hidden_size=architecture.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_epsilon,
        qk_layernorm=architecture.qk_norm,
        add_qkv_bias=architecture.qkv_bias,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        # rows have lengths of their own: stages send each other the shapes first
        variable_seq_lengths=parallel.pipeline > 1,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        pipeline_model_parallel_layout=_pipeline_layout(parallel),
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        perform_initialization=False,  # weights always come from a checkpoint
        calculate_per_token_loss=True,  # gradients are divided once, by the mini-batch's token count
        masked_softmax_fusion=False,  # belongs to an attention that neither backend uses
        # Two interleaved stages exchange activations and gradients between the same pair of ranks. Batched messages of
        # one pair are matched by their order and would be swapped; overlapped messages use two process groups.
        overlap_p2p_comm=parallel.virtual_pipeline > 1,
        batch_p2p_comm=parallel.virtual_pipeline == 1,
        # once a stage has sent its output, only the output's place in the graph is needed
        deallocate_pipeline_outputs=parallel.pipeline > 1,
        **_recomputation(features, fused=not isinstance(backend, TorchLayers), mixture=architecture.num_experts > 0),
        attention_backend=AttnBackend[features.attention_backend],
        **_mixture_settings(architecture, features),
        **backend.settings(mixture=architecture.num_experts > 0) | _unfused_rotation(architecture),
    )


def _unfused_rotation(architecture: Architecture) -> dict[str, Any]:
    scaled = architecture.rope_scaling is not None and architecture.rope_scaling.attention_factor != 1
    return {"apply_rope_fusion": False} if scaled else {}


def _scale_attention(config: Any, architecture: Architecture) -> None:
    """YaRN's factor on rotated queries and keys. Megatron's attention computes it from an attribute that its class of
    configurations does not declare, and the fused rotation of packed rows leaves it out."""
    scaling = architecture.rope_scaling
    if scaling is None or scaling.attention_factor == 1:
        return
    if config.apply_rope_fusion:
        raise UserError(
            "model.megatron.apply_rope_fusion = true: the fused rotation leaves out YaRN's attention factor, which "
            f"{architecture.name} has here; remove the setting"
        )
    config.yarn_rotary_scaling_factor = scaling.factor


def _pipeline_layout(parallel: ParallelConfig) -> Any:  # a list, which Megatron converts into an object of its own
    """The content of each pipeline stage in Megatron's format; None if all stages have the same number of layers."""
    if not parallel.pipeline_layers:
        return None
    layout = [["decoder"] * layers for layers in parallel.pipeline_layers]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout


def _recomputation(features: ModelFeatures, fused: bool, mixture: bool) -> dict[str, Any]:
    if features.recompute == "none":
        return {}
    if features.recompute == "selective":
        modules = recomputed_modules(features.recompute_modules, fused, mixture)
        return {"recompute_granularity": "selective", "recompute_modules": list(modules)}
    if features.recompute_layers:
        block = {"recompute_method": "block", "recompute_num_layers": features.recompute_layers}
        return {"recompute_granularity": "full", **block}
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def _mixture_settings(architecture: Architecture, features: ModelFeatures) -> dict[str, Any]:
    # Megatron's default, allgather, refuses rows of different lengths; flex is DeepEP's kernels here
    dispatcher = {"moe_token_dispatcher_type": features.dispatcher, "moe_flex_dispatcher_backend": "deepep"}
    if not architecture.num_experts:
        return dispatcher  # checked for dense models too
    return dispatcher | {
        "num_moe_experts": architecture.num_experts,
        "moe_router_topk": architecture.num_experts_per_token,
        "moe_ffn_hidden_size": architecture.expert_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": architecture.shared_ffn_hidden_size or None,
        # a list, even of equal layers, gives every layer tensors of its own in checkpoints
        "moe_layer_freq": [int(architecture.has_experts(layer)) for layer in range(architecture.num_layers)]
        if architecture.dense_layers
        else 1,
        "moe_router_score_function": "sigmoid" if architecture.sigmoid_routing else "softmax",
        "moe_router_topk_scaling_factor": architecture.routing_scale if architecture.routing_scale != 1 else None,
        # before the choice: softmax over all experts; after it: over the chosen experts, so that they add up to 1
        "moe_router_pre_softmax": not architecture.normalized_routing,
        "moe_router_dtype": "fp32",  # model.megatron can replace it; docs/decisions.md compares it with the servers'
        "moe_router_load_balancing_type": "none",  # no auxiliary loss in addition to the policy objective
        "moe_enable_routing_replay": features.routing_replay,
    }


def _build_chunk(
    architecture: Architecture, mesh: Mesh, config: TransformerConfig, backend: LayerBackend, chunk: int | None
) -> GPTModel:
    last_chunk = chunk is None or chunk == mesh.config.virtual_pipeline - 1
    with warnings.catch_warnings():
        # GPTModel warns of its successor (HybridModel), which cannot build these models in this release
        warnings.simplefilter("ignore")
        make = partial(
            GPTModel,
            config=config,
            transformer_layer_spec=_block_spec(architecture, config, mesh, backend, chunk),
            vocab_size=architecture.padded_vocab_size,
            max_sequence_length=0,  # used by learned positions only
            pre_process=mesh.is_first_pipeline_stage and chunk in (None, 0),
            post_process=mesh.is_last_pipeline_stage and last_chunk,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=architecture.tied_embeddings,
            parallel_output=True,
            pg_collection=mesh.groups,
            vp_stage=chunk,
        )
        model = backend.build(config, make)
    model.rotary_pos_emb.inv_freq = inverse_frequencies(architecture, mesh.device)
    if architecture.sigmoid_routing:
        _add_expert_biases(model, architecture.num_experts)
    return model.to(mesh.device)


def _add_expert_biases(model: GPTModel, num_experts: int) -> None:
    """Gives every router the bias with which it chooses experts: a parameter without a gradient. Megatron's own bias is
    a buffer that every update changes (moe_router_enable_expert_bias), and conversion and publishing know parameters
    only; its router reads either under this name."""
    routers: list[Any] = [module for module in model.modules() if isinstance(module, TopKRouter)]
    for router in routers:
        bias = torch.empty(num_experts, dtype=torch.float32, device=router.weight.device)
        router.expert_bias = torch.nn.Parameter(bias, requires_grad=False)


def _block_spec(
    architecture: Architecture, config: TransformerConfig, mesh: Mesh, backend: LayerBackend, chunk: int | None
) -> Any:  # GPTModel's own annotation lacks the type
    stage = mesh.pipeline.rank()
    first = get_transformer_layer_offset(config, vp_stage=chunk, pp_rank=stage)
    layers = range(first, first + get_num_layers_to_build(config, vp_stage=chunk, pp_rank=stage))
    specs = {
        mixture: backend.layer(config, mixture) for mixture in {architecture.has_experts(layer) for layer in layers}
    }
    return TransformerBlockSubmodules(
        layer_specs=[specs[architecture.has_experts(layer)] for layer in layers], layer_norm=backend.final_norm
    )
