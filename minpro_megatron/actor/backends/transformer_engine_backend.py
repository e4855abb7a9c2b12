"""Megatron layers of Transformer Engine: norms fused with projections, its attention, grouped experts.

Importing this file imports Transformer Engine; if it is missing or broken, the import raises ImportError or OSError.
The tests without a GPU check Megatron's own classes around Transformer Engine, their parameters, checkpoints and
collectives, with a stand-in that has the same modules in plain torch (tests/mesh/transformer_engine_stand_in.py).
These tests do not run the kernels.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformer_engine.pytorch as te
from megatron.core.extensions import transformer_engine as extension
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

# Transformer Engine names a norm's weights after the projection that the norm is fused with. In checkpoints they keep
# the names that they have without fusion, so that either backend loads what the other saved.
_CHECKPOINT_NAMES = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


class TransformerEngineRMSNorm(te.RMSNorm):
    """RMSNorm; its weight is marked for Megatron's sum of gradients over sequence-parallel ranks."""

    # A module's float8 state would be saved in checkpoints; the torch backend has such a state for projections only.
    get_extra_state = torch.nn.Module.get_extra_state
    set_extra_state = torch.nn.Module.set_extra_state

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(
            normalized_shape=hidden_size,
            eps=eps,
            sequence_parallel=config.sequence_parallel,
            params_dtype=config.params_dtype,
            device=torch.cuda.current_device(),
        )


class TransformerEngineAttention(TEDotProductAttention):
    """Flash or cuDNN attention inside each sequence of a packed row; context ranks exchange keys and values."""

    has_graph_for_each_count = True  # of sequences in a row: see batching.row_lengths.padding_sequences
    get_extra_state = torch.nn.Module.get_extra_state
    set_extra_state = torch.nn.Module.set_extra_state


class _Modules(TESpecProvider):
    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> Any:
        return TransformerEngineRMSNorm

    def core_attention(self) -> type:
        return TransformerEngineAttention


class TransformerEngineLayers:
    """The layers of `model.backend = transformer_engine`."""

    final_norm = TransformerEngineRMSNorm

    def __init__(self, device: torch.device) -> None:
        self._compiles = device.type == "cuda"  # Megatron's fusions are compiled for the GPU

    def settings(self, mixture: bool) -> dict[str, Any]:
        experts = {
            "moe_grouped_gemm": True,
            "moe_permute_fusion": self._compiles and extension.fused_permute_with_probs is not None,
        }
        return {
            "apply_rope_fusion": self._compiles and hasattr(extension, "fused_apply_rotary_pos_emb_thd"),
            "bias_activation_fusion": self._compiles,
            "bias_dropout_fusion": self._compiles,
            # products add to the float32 gradients, instead of a bfloat16 gradient of every weight and micro-batch
            "gradient_accumulation_fusion": self._compiles,
            "cp_comm_type": "p2p",
        } | (experts if mixture else {})

    def build(self, config: TransformerConfig, make: Callable[[], GPTModel]) -> GPTModel:
        """Megatron's output layer refuses gradient_accumulation_fusion without NVIDIA Apex. It is made without, because
        its forward pass is never called here (parallel/log_probs.py); Transformer Engine's modules need no Apex."""
        fuses, config.gradient_accumulation_fusion = config.gradient_accumulation_fusion, False
        model = make()
        config.gradient_accumulation_fusion = fuses
        for module in model.modules():
            if isinstance(module, (te.Linear, te.LayerNormLinear, te.GroupedLinear)):
                projection: Any = module
                projection.fuse_wgrad_accumulation = fuses
        return model

    def layer(self, config: TransformerConfig, mixture: bool) -> ModuleSpec:
        """`mixture`: its feed-forward network is made of experts."""
        modules = _Modules()
        add_residual: Any = get_bias_dropout_add
        return ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                self_attention=ModuleSpec(
                    module=SelfAttention,
                    params={"attn_mask_type": AttnMaskType.causal},
                    submodules=SelfAttentionSubmodules(
                        linear_qkv=modules.column_parallel_layer_norm_linear(),  # type: ignore[arg-type]
                        core_attention=modules.core_attention(),
                        linear_proj=modules.row_parallel_linear(),
                        q_layernorm=TransformerEngineRMSNorm if config.qk_layernorm else None,
                        k_layernorm=TransformerEngineRMSNorm if config.qk_layernorm else None,
                    ),
                ),
                self_attn_bda=add_residual,
                # a dense layer's norm is fused with its first projection; in a mixture the router needs its output too
                pre_mlp_layernorm=TransformerEngineRMSNorm if mixture else IdentityOp,
                mlp=get_mlp_module_spec_for_backend(
                    backend=modules,
                    num_experts=config.num_moe_experts if mixture else None,
                    moe_grouped_gemm=mixture,
                ),
                mlp_bda=add_residual,
                sharded_state_dict_keys_map=_CHECKPOINT_NAMES,
            ),
        )
