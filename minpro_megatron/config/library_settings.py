"""The settings that a run hands on to the libraries below it, under the names that these libraries give them.

`server.arguments` are options of SGLang's server, `model.megatron` fields of Megatron-Core's TransformerConfig,
`optimizer.megatron` of its OptimizerConfig and `parallel.ddp` of its DistributedDataParallelConfig. The table below
lists the names that are refused there, because another setting or the run itself decides the value; without the table
a run would have two values for one fact. Names that it does not list go to the library, which checks them in preflight
(actor/megatron_settings.py, serving/sglang_arguments.py).
"""

from typing import Annotated

from pydantic import AfterValidator, JsonValue

# By dictionary: the setting that decides, or the reason why there is none (a text with spaces) -> the refused names.
_OWNED: dict[str, dict[str, str]] = {
    "server.arguments": {
        "model.hf_path": "model_path tokenizer_path",
        "server.host": "host",
        "server.first_port": "port",
        "server.api_key_variable": "api_key admin_api_key",
        "server.device": "device",
        "server.dtype": "dtype",
        "server.tensor_parallel": "tp_size",
        "server.expert_parallel": "ep_size",
        "server.placement": "enable_memory_saver",
        "server.memory_fraction": "mem_fraction_static",
        "server.max_total_tokens": "max_total_tokens",
        "server.max_running_requests": "max_running_requests",
        "sampling.max_response_tokens": "context_length",
        "seed": "random_seed",
        "model.routing_replay": "enable_return_routed_experts",
        "publish.pause_mode": "disable_overlap_schedule",
        "the run starts every server on one machine and gives it the GPUs": (
            "base_gpu_id gpu_id_step nnodes node_rank dist_init_addr dp_size pp_size attn_dp_size enable_dp_attention"
        ),
        "the run numbers the versions of the weights": "weight_version",
        "the run sends tokens and receives tokens over HTTP": "skip_tokenizer_init skip_server_warmup ssl_certfile "
        "ssl_keyfile disaggregation_mode",
        "a file of options would not be in run.json": "config",
    },
    "model.megatron": {
        "model.hf_path": (
            "num_layers hidden_size num_attention_heads num_query_groups kv_channels ffn_hidden_size normalization "
            "layernorm_epsilon qk_layernorm gated_linear_unit activation_func add_bias_linear num_moe_experts "
            "moe_router_topk moe_ffn_hidden_size moe_router_pre_softmax add_qkv_bias attention_output_gate "
            "softmax_scale softmax_type window_size window_attn_skip_freq rotary_interleaved "
            "apply_residual_connection_post_layernorm layernorm_zero_centered_gamma qk_l2_norm qk_clip "
            "glu_linear_offset activation_func_clamp_value no_rope_freq multi_latent_attention "
            "experimental_attention_variant mtp_num_layers moe_shared_expert_intermediate_size "
            "moe_shared_expert_gate moe_layer_freq moe_router_score_function moe_router_topk_scaling_factor "
            "moe_router_num_groups moe_router_group_topk moe_router_topk_limited_devices "
            "moe_router_enable_expert_bias moe_latent_size heterogeneous_block_specs is_hybrid_model use_mup "
            "mrope_section moe_apply_probs_on_input apply_query_key_layer_scaling"
        ),
        "model.dtype": "fp16 bf16 params_dtype pipeline_dtype enable_autocast autocast_dtype fp8_param fp4_param",
        "model.backend": "moe_grouped_gemm transformer_impl use_kitchen use_inference_optimized_layers "
        "masked_softmax_fusion",
        "model.attention_backend": "attention_backend",
        "model.recompute": "recompute_granularity recompute_method recompute_num_layers recompute_modules "
        "distribute_saved_activations moe_layer_recompute",
        "model.routing_replay": "moe_enable_routing_replay",
        "parallel.dispatcher": "moe_token_dispatcher_type moe_flex_dispatcher_backend moe_enable_deepep",
        "parallel.tensor": "tensor_model_parallel_size sequence_parallel",
        "parallel.pipeline": "pipeline_model_parallel_size",
        "parallel.virtual_pipeline": "virtual_pipeline_model_parallel_size",
        "parallel.pipeline_layers": "pipeline_model_parallel_layout num_layers_in_first_pipeline_stage "
        "num_layers_in_last_pipeline_stage account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split",
        "parallel.context": "context_parallel_size hierarchical_context_parallel_sizes hybrid_context_parallel",
        "parallel.expert": "expert_model_parallel_size",
        "parallel.expert_tensor": "expert_tensor_parallel_size",
        "weights always come from a checkpoint": "perform_initialization init_method output_layer_init_method "
        "embedding_init_method init_model_with_meta_device",
        "the update divides and reduces the gradient": "calculate_per_token_loss finalize_model_grads_func "
        "grad_scale_func moe_grad_scale_func mtp_grad_scale_func no_sync_func grad_sync_func param_sync_func",
        "rows of tokens have lengths of their own": "variable_seq_lengths overlap_p2p_comm batch_p2p_comm",
        "pipeline stages free what they have sent": "deallocate_pipeline_outputs",
        "the loss is the policy objective, without auxiliary losses": "moe_router_load_balancing_type "
        "moe_aux_loss_coeff moe_z_loss_coeff",
        "a token's log-prob must not depend on random numbers or on other tokens": "hidden_dropout attention_dropout "
        "moe_token_dropping moe_expert_capacity_factor moe_pad_expert_input_to_capacity moe_input_jitter_eps "
        "moe_router_force_load_balancing moe_router_force_biased test_mode",
    },
    "optimizer.megatron": {
        "optimizer.learning_rate": "lr min_lr decoupled_lr decoupled_min_lr",
        "optimizer.weight_decay": "weight_decay",
        "optimizer.beta1": "adam_beta1",
        "optimizer.beta2": "adam_beta2",
        "optimizer.epsilon": "adam_eps",
        "optimizer.clip_grad": "clip_grad",
        "optimizer.cpu_offload": "optimizer_cpu_offload optimizer_offload_fraction overlap_cpu_optimizer_d2h_h2d",
        "model.dtype": "fp16 bf16 params_dtype loss_scale initial_loss_scale min_loss_scale loss_scale_window "
        "hysteresis",
        "checkpoints and planner expect AdamW with float32 states, sharded over the ranks": (
            "optimizer decoupled_weight_decay use_distributed_optimizer use_layer_wise_distributed_optimizer "
            "use_precision_aware_optimizer store_param_remainders main_grads_dtype main_params_dtype exp_avg_dtype "
            "exp_avg_sq_dtype"
        ),
        "the update reports which gradients it skips": "grad_norm_skip_threshold",
        "updates do not overlap with communication": "overlap_param_gather overlap_param_gather_with_optimizer_step",
    },
    "parallel.ddp": {
        "checkpoints and planner expect float32 gradients and an optimizer sharded over the ranks": (
            "grad_reduce_in_fp32 use_distributed_optimizer num_distributed_optimizer_instances use_megatron_fsdp "
            "use_custom_fsdp data_parallel_sharding_strategy outer_dp_sharding_strategy"
        ),
        "model.dtype": "fp8_param_gather fp4_param_gather",
        "the update divides and checks the gradient": "check_for_nan_in_grad check_for_large_grads "
        "average_in_collective gradient_reduce_div_fusion",
        "updates do not overlap with the gathering of parameters": "overlap_param_gather align_param_gather "
        "delay_wgrad_compute",
    },
}  # fmt: skip

DICTIONARIES = tuple(_OWNED)


def owners(dictionary: str) -> dict[str, str]:
    """For each name that `dictionary` refuses: the setting that decides its value, or the reason why none does.

    >>> owners("server.arguments")["tp_size"]
    'server.tensor_parallel'
    """
    return {name: owner for owner, names in _OWNED[dictionary].items() for name in names.split()}


def refusal(name: str, owner: str) -> str:
    """The reason why `name`, of this owner, cannot be given in a dictionary."""
    if " " in owner:
        return f"{name} cannot be set: {owner}; remove it"
    return f"{name} is decided by {owner}: remove it, and set {owner}"


def _checked(dictionary: str) -> AfterValidator:
    def check(values: dict[str, JsonValue]) -> dict[str, JsonValue]:
        owner_of = owners(dictionary)
        if found := [refusal(name, owner_of[name]) for name in values if name in owner_of]:
            raise ValueError("; ".join(found))
        return values

    return AfterValidator(check)


# The types of the four settings.
ServerArguments = Annotated[dict[str, JsonValue], _checked("server.arguments")]
ModelFields = Annotated[dict[str, JsonValue], _checked("model.megatron")]
OptimizerFields = Annotated[dict[str, JsonValue], _checked("optimizer.megatron")]
DdpFields = Annotated[dict[str, JsonValue], _checked("parallel.ddp")]
