"""Megatron's and vLLM's options that megarl sets from its own configuration, and what to set instead.

Set in two places they could disagree, so the tables `megatron:` and `vllm:` refuse them.
"""

_SHAPE = "change the model's config.json in model.path"
_FIXED = "remove it; training depends on megarl's value"
_LAID_OUT = "remove it; weights are pushed and saved as Megatron lays them out without it"
_PLACE = "remove it; processes are placed by parallel.processes and rollout.tensor"

#: By table: field -> the fix.
OWNED: dict[str, dict[str, str]] = {
    "megatron": {
        "tensor_model_parallel_size": "set parallel.tensor",
        "pipeline_model_parallel_size": "set parallel.pipeline",
        "virtual_pipeline_model_parallel_size": "set parallel.virtual_pipeline",
        "context_parallel_size": "set parallel.context",
        "expert_model_parallel_size": "set parallel.expert",
        "expert_tensor_parallel_size": "set parallel.expert_tensor",
        **dict.fromkeys(("tensor_parallel_num_weight_shards", "gtp_weight_remat_size"), "set parallel.tensor"),
        **dict.fromkeys(
            ("expert_tensor_parallel_num_weight_shards", "expert_gtp_weight_remat_size"), "set parallel.expert_tensor"
        ),
        "sequence_parallel": "set parallel.sequence",
        **dict.fromkeys(
            (
                "pipeline_model_parallel_layout", "num_layers_in_first_pipeline_stage",
                "num_layers_in_last_pipeline_stage",
            ),
            "set parallel.stage_layers",
        ),
        "account_for_embedding_in_pipeline_split": "set parallel.account_for_embedding",
        "account_for_loss_in_pipeline_split": "set parallel.account_for_loss",
        "recompute_granularity": "set recompute.kind",
        "recompute_modules": "set recompute.modules",
        "recompute_method": "set recompute.method",
        "recompute_num_layers": "set recompute.layers",
        "moe_aux_loss_coeff": "set moe.aux_loss_coefficient",
        "moe_router_dtype": "set moe.router_dtype",
        "moe_enable_routing_replay": "set moe.routing_replay",
        **dict.fromkeys(
            (
                "bf16", "fp16", "params_dtype", "pipeline_dtype", "autocast_dtype",
                # FP8 and FP4, and what goes with them.
                "fp8", "fp8_recipe", "fp8_quantizer_factory", "fp8_interval", "fp8_wgrad", "fp8_dot_product_attention",
                "fp8_multi_head_attention", "fp4", "fp4_recipe", "fp4_param", "fp4_quantizer_factory",
                "tp_only_amax_red", "moe_router_padding_for_quantization", "moe_router_padding_for_fp8",
                "activation_func_fp8_input_store", "reuse_grad_buf_for_mxfp8_param_ag", "keep_fp8_transpose_cache",
                "disable_parameter_transpose_cache", "quant_recipe", "use_kitchen", "use_kitchen_attention",
                "kitchen_attention_backend", "fp8_output_proj", "fp4_param_gather",
            ),
            "set precision",
        ),
        "deterministic_mode": "set deterministic",
        **dict.fromkeys(("fp8_param", "fp8_param_gather"), "set precision and fp8.param"),
        "fp8_margin": "set precision and fp8.margin",
        "fp8_amax_history_len": "set precision and fp8.amax_history_len",
        "fp8_amax_compute_algo": "set precision and fp8.amax_compute_algo",
        **dict.fromkeys(
            ("first_last_layers_bf16", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"),
            "set precision, fp8.num_layers_at_start_in_bf16 and fp8.num_layers_at_end_in_bf16",
        ),
        "lr": "set optimizer.lr",
        "min_lr": "set optimizer.min_lr",
        "weight_decay": "set optimizer.weight_decay",
        "adam_beta1": "set optimizer.betas",
        "adam_beta2": "set optimizer.betas",
        "adam_eps": "set optimizer.epsilon",
        "clip_grad": "set optimizer.clip_grad",
        **dict.fromkeys(
            (
                "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size",
                "kv_channels", "normalization", "layernorm_epsilon", "add_bias_linear", "add_qkv_bias",
                "gated_linear_unit", "activation_func", "qk_layernorm", "multi_latent_attention", "num_moe_experts",
                "window_size", "rotary_interleaved", "softmax_scale", "moe_ffn_hidden_size", "moe_layer_freq",
                "moe_router_topk", "moe_router_pre_softmax", "moe_shared_expert_intermediate_size",
                "moe_shared_expert_gate", "use_mup", "mup_width_mult", "mup_base_hidden_size", "mup_embedding_mult",
                "mup_output_mult", "mup_base_head_dim", "mup_attn_scale_power",
            ),
            _SHAPE,
        ),
        **dict.fromkeys(
            (
                "hidden_dropout", "attention_dropout", "calculate_per_token_loss", "variable_seq_lengths",
                "perform_initialization", "use_distributed_optimizer", "moe_token_dispatcher_type",
                "finalize_model_grads_func", "check_for_nan_in_grad", "overlap_grad_reduce", "overlap_param_gather",
                "overlap_param_gather_with_optimizer_step", "use_megatron_fsdp", "num_distributed_optimizer_instances",
                "moe_grouped_gemm", "overlap_p2p_comm", "batch_p2p_comm",
                "batch_p2p_sync", "gradient_accumulation_fusion", "optimizer",
                "use_layer_wise_distributed_optimizer", "grad_norm_skip_threshold", "moe_router_load_balancing_type",
                "moe_router_quantile_balancing_ema", "moe_router_force_load_balancing", "moe_router_force_biased",
                "moe_z_loss_coeff",
            ),
            _FIXED,
        ),
        # Parameters of another shape, or in another order, than checkpoints and engines have them.
        **dict.fromkeys(
            (
                "use_transformer_engine_op_fuser", "use_grouped_gemm_for_dense_mlp", "moe_single_grouped_weight",
                "use_grouped_gemm_for_shared_expert", "moe_single_grouped_bias", "moe_mlp_glu_interleave_size",
                "moe_shared_expert_glu_interleave_size",
            ),
            _LAID_OUT,
        ),
    },
    "vllm": {
        "model": "set model.path",
        "model_weights": "set model.path or model.weights",
        "tokenizer": "set model.tokenizer",
        "dtype": "set precision",
        "seed": "set seed",
        "tensor_parallel_size": "set rollout.tensor",
        "max_model_len": "set data.max_prompt_tokens and rollout.max_tokens",
        "max_num_seqs": "set rollout.max_concurrent",
        "gpu_memory_utilization": "set rollout.gpu_memory_fraction",
        "kv_cache_memory_bytes": "set rollout.kv_cache_gib",
        "enable_expert_parallel": "set rollout.expert_parallel",
        **dict.fromkeys(
            ("enable_eplb", "eplb_config", "enable_elastic_ep"),
            "remove it; pushes go to experts that stay where they are",
        ),
        **dict.fromkeys(
            (
                "quantization", "hf_overrides", "skip_tokenizer_init", "load_format", "enable_sleep_mode",
                "logprobs_mode", "generation_config", "enable_return_routed_experts", "aux_output_config",
                "logits_processors", "config_format", "hf_config_path",
                "quantization_config", "runner", "convert",
            ),
            _FIXED,
        ),
        "override_generation_config": "set temperature, top_p and max_tokens of rollout and evaluation",
        **dict.fromkeys(
            (
                "distributed_executor_backend", "pipeline_parallel_size", "data_parallel_size", "data_parallel_rank",
                "data_parallel_backend", "master_addr", "master_port", "nnodes", "node_rank", "worker_cls",
            ),
            _PLACE,
        ),
    },
}  # fmt: skip
