"""The architecture that a Hugging Face config.json describes, as one frozen record, for the supported models."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.errors import UserError
from minpro_megatron.models.config_fields import ConfigFields
from minpro_megatron.models.model_files import read_json_object
from minpro_megatron.models.rope_scaling import RopeScaling, read_rope

VOCABULARY_MULTIPLE = 128  # fixed for every mesh, so that a checkpoint fits every tensor degree up to 128
# Far above any model's: with a damaged config.json the table of tensors must not fill the memory.
MAX_LAYERS, MAX_EXPERTS = 4096, 65536


@dataclass(frozen=True)
class Architecture:
    """Sizes and parts of a supported model. `num_experts` is 0 for a dense one."""

    name: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    ffn_hidden_size: int
    num_experts: int
    num_experts_per_token: int
    expert_ffn_hidden_size: int
    vocab_size: int
    rope_theta: float
    norm_epsilon: float
    tied_embeddings: bool
    normalized_routing: bool = True  # the router's weights of a token's chosen experts add up to 1
    qkv_bias: bool = False  # the projections to queries, keys and values add a bias
    qk_norm: bool = True  # the queries and keys of every head are normalized
    rope_scaling: RopeScaling | None = None
    rotary_share: float = 1.0  # of a head's dimensions, the first ones, which are rotated
    dense_layers: int = 0  # of a mixture: the first layers, whose feed-forward network is not made of experts
    shared_ffn_hidden_size: int = 0  # of a mixture: the width of the network that all tokens pass besides their experts
    # A token's experts have the largest sigmoids plus a bias that is not trained; their weights are the sigmoids alone.
    sigmoid_routing: bool = False
    routing_scale: float = 1.0  # multiplies the weights of a token's chosen experts
    prediction_layers: int = 0  # after the last layer, for guesses of later tokens; they are not read

    @property
    def rotary_dim(self) -> int:
        """The number of a head's dimensions that are rotated."""
        return int(self.head_dim * self.rotary_share)

    @property
    def expert_layers(self) -> int:
        """The number of layers with experts, which are the last ones."""
        return max(self.num_layers - self.dense_layers, 0) if self.num_experts else 0

    def has_experts(self, layer: int) -> bool:
        """`layer` counts from 0."""
        return layer >= self.num_layers - self.expert_layers

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def read_architecture(hf_path: str | Path) -> Architecture:
    """The architecture of the Hugging Face folder `hf_path`.

    Raises ValueError if it is not supported, or uses a feature with which the results would silently be wrong.
    """
    path = Path(hf_path) / "config.json"
    if not path.is_file():
        raise UserError(f"model.hf_path = {hf_path}: there is no config.json; give a Hugging Face model folder")
    return parse_architecture(read_json_object(path), str(path))


def parse_architecture(config: dict[str, Any], where: str) -> Architecture:
    """The architecture that a config.json describes; errors as in `read_architecture`, which name `where`."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else "none"
    if not isinstance(name, str) or name not in _READERS:
        raise UserError(f"{where}: architectures = {name!r} is not known; known: {', '.join(_READERS)}")
    _refuse_quantized(where, config)
    try:
        return _READERS[name](ConfigFields(config, where))
    except KeyError as error:
        raise UserError(f"{where}: {error.args[0]} is missing; use the config.json of the released model") from None


def _refuse_quantized(where: str, config: dict[str, Any]) -> None:
    quantisation = config.get("quantization_config") or config.get("compression_config")
    if quantisation:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
        raise UserError(
            f"{where}: quantization_config.quant_method = {method!r}: these are quantized weights, and training needs "
            "bfloat16 weights; use the release without quantization, or `minpro convert dequantize` for float8 with "
            "scales of blocks"
        )


def _qwen3(fields: ConfigFields) -> Architecture:
    fields.only("attention_bias", False, False)
    fields.only("use_sliding_window", False, False)
    return _transformer(fields, "Qwen3ForCausalLM", fields.size("intermediate_size"))


def _qwen2(fields: ConfigFields) -> Architecture:
    """The bias of the projections is a part of the architecture, and no field of its config.json."""
    fields.only("use_sliding_window", False, False)
    dense = _transformer(fields, "Qwen2ForCausalLM", fields.size("intermediate_size"))
    return replace(dense, qkv_bias=True, qk_norm=False)


def _llama(fields: ConfigFields) -> Architecture:
    fields.only("attention_bias", False, False)
    fields.only("mlp_bias", False, False)
    return replace(_transformer(fields, "LlamaForCausalLM", fields.size("intermediate_size")), qk_norm=False)


def _qwen3_moe(fields: ConfigFields) -> Architecture:
    fields.only("attention_bias", False, False)
    fields.only("use_sliding_window", False, False)
    fields.only("decoder_sparse_step", 1, 1)  # every layer is an MoE layer
    fields.only("mlp_only_layers", [], [])
    width = fields.size("moe_intermediate_size")
    # a model without dense layers need not state their width
    dense_width = fields.size("intermediate_size") if fields.has("intermediate_size") else width
    # transformers 5 writes num_local_experts where the released checkpoints say num_experts
    num_experts = fields.size("num_local_experts" if fields.has("num_local_experts") else "num_experts", MAX_EXPERTS)
    return replace(
        _transformer(fields, "Qwen3MoeForCausalLM", dense_width),
        num_experts=num_experts,
        num_experts_per_token=fields.size("num_experts_per_tok", num_experts),
        expert_ffn_hidden_size=width,
        normalized_routing=fields.switch("norm_topk_prob"),
    )


def _glm4_moe(fields: ConfigFields) -> Architecture:
    """GLM-4.5 and later releases with the same layers. Absent fields have the defaults of transformers."""
    for grouped in ("n_group", "topk_group"):
        fields.only(grouped, 1, 1)  # Megatron scores a group by another number of its experts than transformers
    fields.only("norm_topk_prob", True, True)  # Megatron normalizes sigmoids whatever its settings are
    num_experts = fields.size("n_routed_experts", MAX_EXPERTS)
    chosen = fields.size("num_experts_per_tok", num_experts, least=2)  # Megatron does not normalize the weight of one
    dense = _transformer(fields, "Glm4MoeForCausalLM", fields.size("intermediate_size"))
    if dense.rope_scaling is not None:
        raise UserError(f"{fields.where}: rope_scaling with partly rotated heads is not supported; remove it")
    width = fields.size("moe_intermediate_size")
    layers = fields.size("first_k_dense_replace", dense.num_layers - 1, least=0, absent=1)
    return replace(
        dense,
        num_experts=num_experts,
        num_experts_per_token=chosen,
        expert_ffn_hidden_size=width,
        qkv_bias=fields.switch("attention_bias"),
        qk_norm=fields.switch("use_qk_norm"),
        rotary_share=_rotary_share(fields, dense.head_dim),
        dense_layers=layers,
        shared_ffn_hidden_size=width * fields.size("n_shared_experts", absent=1),
        sigmoid_routing=True,
        routing_scale=fields.number("routed_scaling_factor", absent=1.0),
        prediction_layers=fields.size("num_nextn_predict_layers", least=0, absent=0),
    )


def _rotary_share(fields: ConfigFields, head_dim: int) -> float:
    """partial_rotary_factor, beside rope_theta or, as transformers 5 writes it, within rope_parameters."""
    within = fields.within("rope_parameters")
    share = (within if within.has("partial_rotary_factor") else fields).number("partial_rotary_factor", absent=0.5)
    if share > 1 or int(head_dim * share) < 2 or int(head_dim * share) % 2:
        raise UserError(
            f"{fields.where}: partial_rotary_factor = {share:g} must be at most 1 and choose an even number of the "
            f"head_dim = {head_dim} dimensions"
        )
    return share


def _transformer(fields: ConfigFields, name: str, ffn_hidden_size: int) -> Architecture:
    """The fields that all architectures have, without experts."""
    fields.only("hidden_act", "silu", "silu")
    heads, hidden_size = fields.size("num_attention_heads"), fields.size("hidden_size")
    rope_theta, rope_scaling = read_rope(fields)
    return Architecture(
        name=name,
        num_layers=fields.size("num_hidden_layers", MAX_LAYERS),
        hidden_size=hidden_size,
        num_attention_heads=heads,
        num_query_groups=fields.size("num_key_value_heads"),
        head_dim=fields.size("head_dim") if fields.has("head_dim") else hidden_size // heads,
        ffn_hidden_size=ffn_hidden_size,
        num_experts=0,
        num_experts_per_token=0,
        expert_ffn_hidden_size=0,
        vocab_size=fields.size("vocab_size"),
        rope_theta=rope_theta,
        norm_epsilon=fields.number("rms_norm_eps"),
        tied_embeddings=fields.switch("tie_word_embeddings"),
        rope_scaling=rope_scaling,
    )


_READERS = {
    "Glm4MoeForCausalLM": _glm4_moe,
    "LlamaForCausalLM": _llama,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "Qwen3MoeForCausalLM": _qwen3_moe,
}


def refuse_uneven_cuts(architecture: Architecture, parallel: ParallelConfig) -> None:
    """Raises ValueError if the mesh's degrees do not divide the model's sizes, or its layers are not the model's."""
    rules = [
        ("tensor", parallel.tensor, "num_attention_heads", architecture.num_attention_heads),
        ("tensor", parallel.tensor, "padded vocabulary", architecture.padded_vocab_size),
    ]
    if architecture.num_experts:
        rules.append(("expert", parallel.expert, "num_experts", architecture.num_experts))
        rules.append(
            (
                "expert_tensor",
                parallel.expert_tensor,
                "moe_intermediate_size",
                architecture.expert_ffn_hidden_size,
            )
        )
        if architecture.shared_ffn_hidden_size:
            rules.append(("tensor", parallel.tensor, "shared experts' width", architecture.shared_ffn_hidden_size))
    elif parallel.expert > 1:
        raise UserError(f"parallel.expert = {parallel.expert}: {architecture.name} has no experts; set it to 1")
    if architecture.expert_layers < architecture.num_layers:
        rules.append(("tensor", parallel.tensor, "intermediate_size", architecture.ffn_hidden_size))
    _refuse_other_layers(architecture.num_layers, parallel)
    for axis, degree, what, size in rules:
        if size % degree:
            raise UserError(f"parallel.{axis} = {degree} must divide the model's {what} = {size}")
    groups = architecture.num_query_groups
    if groups % parallel.tensor and parallel.tensor % groups:  # with fewer heads, several ranks compute the same head
        raise UserError(
            f"parallel.tensor = {parallel.tensor} must divide the model's num_key_value_heads = {groups}, or be a "
            "multiple of it"
        )


def _refuse_other_layers(num_layers: int, parallel: ParallelConfig) -> None:
    layers, chunks = parallel.pipeline_layers, parallel.pipeline * parallel.virtual_pipeline
    if layers and sum(layers) != num_layers:
        raise UserError(
            f"parallel.pipeline_layers = {'+'.join(map(str, layers))} adds up to {sum(layers)}, but the model's layers "
            f"= {num_layers}: give numbers that add up to that"
        )
    if layers or not num_layers % chunks:
        return
    problem = f"parallel.pipeline x virtual_pipeline = {chunks} must divide the model's layers = {num_layers}"
    if num_layers < chunks:
        raise UserError(f"{problem}; lower pipeline or virtual_pipeline")
    least, more = divmod(num_layers, chunks)
    example = "+".join(str(least + (chunk < more)) for chunk in range(chunks))
    raise UserError(f"{problem}, or parallel.pipeline_layers say how many each has, such as {example}")
