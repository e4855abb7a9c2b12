"""What a Hugging Face config.json says about the model, in one frozen record, for the architectures we know."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minpro_megatron.config.parallel import ParallelConfig

VOCABULARY_MULTIPLE = 128  # fixed whatever the mesh, so that a checkpoint fits every tensor degree up to 128


@dataclass(frozen=True)
class Architecture:
    """Sizes of a Qwen3 dense or Qwen3-MoE model. `num_experts` is 0 for a dense one."""

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
    normalized_routing: bool = True  # the weights of a token's chosen experts add up to 1

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def read_architecture(hf_path: str | Path) -> Architecture:
    """The architecture of the Hugging Face folder `hf_path`.

    Raises ValueError if it is not one we know, or uses a feature that would silently compute something else.
    """
    path = Path(hf_path) / "config.json"
    if not path.is_file():
        raise ValueError(f"model.hf_path = {hf_path}: there is no config.json; give a Hugging Face model folder")
    return parse_architecture(json.loads(path.read_text()), str(path))


def parse_architecture(config: dict[str, Any], where: str) -> Architecture:
    """The architecture that a config.json describes; errors as of `read_architecture`, told of `where`."""
    names = config.get("architectures") or ["none"]
    if names[0] not in _READERS:
        raise ValueError(f"{where}: architectures = {names[0]!r} is not known; known: {', '.join(_READERS)}")
    _refuse_unsupported(where, config)
    try:
        return _READERS[names[0]](config)
    except KeyError as error:
        raise ValueError(f"{where}: {error.args[0]} is missing; take the config.json of the released model") from None


# field -> (what transformers takes where it is absent, the only value supported)
_DENSE_ONLY = {
    "attention_bias": (False, False),
    "use_sliding_window": (False, False),
    "hidden_act": ("silu", "silu"),
}
_MIXTURE_ONLY = {
    "decoder_sparse_step": (1, 1),  # every layer is an MoE layer
    "mlp_only_layers": ([], []),
}


def _refuse_unsupported(where: str, config: dict[str, Any]) -> None:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"{where}: rope type {rope!r} is not supported; only the default rotary embedding is")
    mixture = config["architectures"][0] == "Qwen3MoeForCausalLM"
    for field, (absent, supported) in (_DENSE_ONLY | (_MIXTURE_ONLY if mixture else {})).items():
        value = absent if config.get(field) is None else config[field]
        if value != supported:
            raise ValueError(f"{where}: {field} = {value!r} is not supported; only {supported!r} is")


def _qwen3(config: dict[str, Any]) -> Architecture:
    rope = config.get("rope_parameters") or {}
    return Architecture(
        name=config["architectures"][0],
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config["num_key_value_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        ffn_hidden_size=config["intermediate_size"],
        num_experts=0,
        num_experts_per_token=0,
        expert_ffn_hidden_size=0,
        vocab_size=config["vocab_size"],
        # required: the default differs between versions of transformers, and a wrong one is wrong everywhere
        rope_theta=float(rope.get("rope_theta") or config["rope_theta"]),
        norm_epsilon=config["rms_norm_eps"],
        tied_embeddings=config.get("tie_word_embeddings", False),
    )


def _qwen3_moe(config: dict[str, Any]) -> Architecture:
    dense = _qwen3({**config, "intermediate_size": config.get("intermediate_size") or config["moe_intermediate_size"]})
    # transformers 5 writes num_local_experts where the released checkpoints say num_experts
    num_experts = config.get("num_local_experts") or config["num_experts"]
    return Architecture(
        **{
            **vars(dense),
            "num_experts": num_experts,
            "num_experts_per_token": config["num_experts_per_tok"],
            "expert_ffn_hidden_size": config["moe_intermediate_size"],
            "normalized_routing": bool(config.get("norm_topk_prob")),  # transformers takes false where it is absent
        }
    )


_READERS = {"Qwen3ForCausalLM": _qwen3, "Qwen3MoeForCausalLM": _qwen3_moe}


def refuse_uneven_cuts(architecture: Architecture, parallel: ParallelConfig) -> None:
    """Raises ValueError where the mesh's degrees do not divide the model's sizes, or its layers are not the model's."""
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
    elif parallel.expert > 1:
        raise ValueError(f"parallel.expert = {parallel.expert}: {architecture.name} has no experts; set it to 1")
    else:
        rules.append(("tensor", parallel.tensor, "intermediate_size", architecture.ffn_hidden_size))
    _refuse_other_layers(architecture.num_layers, parallel)
    for axis, degree, what, size in rules:
        if size % degree:
            raise ValueError(f"parallel.{axis} = {degree} must divide the model's {what} = {size}")
    groups = architecture.num_query_groups
    if groups % parallel.tensor and parallel.tensor % groups:  # a head of fewer is computed by several ranks
        raise ValueError(
            f"parallel.tensor = {parallel.tensor} must divide the model's num_key_value_heads = {groups}, or be a "
            "multiple of it"
        )


def _refuse_other_layers(num_layers: int, parallel: ParallelConfig) -> None:
    layers, chunks = parallel.pipeline_layers, parallel.pipeline * parallel.virtual_pipeline
    if layers and sum(layers) != num_layers:
        raise ValueError(
            f"parallel.pipeline_layers = {'+'.join(map(str, layers))} adds up to {sum(layers)}, but the model's layers "
            f"= {num_layers}: give numbers that add up to that"
        )
    if layers or not num_layers % chunks:
        return
    problem = f"parallel.pipeline x virtual_pipeline = {chunks} must divide the model's layers = {num_layers}"
    if num_layers < chunks:
        raise ValueError(f"{problem}; lower pipeline or virtual_pipeline")
    least, more = divmod(num_layers, chunks)
    example = "+".join(str(least + (chunk < more)) for chunk in range(chunks))
    raise ValueError(f"{problem}, or parallel.pipeline_layers say how many each has, such as {example}")
