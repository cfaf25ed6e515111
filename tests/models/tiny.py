"""A tiny random model of every causal-LM type of transformers, made from its configuration's own defaults."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY, HIDDEN, HEADS, GROUPS, SIZE, LAYERS, LENGTH, INNER, EXPERTS = 96, 32, 4, 2, 8, 4, 64, 48, 4
_NAMES = [
    (VOCABULARY, "vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    (
        HIDDEN,
        "hidden_size n_embd d_model dim embedding_size embed_dim emb_dim lru_width word_embed_proj_dim "
        "hidden_size_per_layer_input conv_dim block_dim projection_dim output_dim attention_hidden_size",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
        "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads index_n_heads mamba_n_heads "
        "mamba_num_heads linear_num_heads linear_num_key_heads linear_num_value_heads n_mamba_heads",
    ),
    (
        GROUPS,
        "num_key_value_heads num_global_key_value_heads kv_n_heads num_kv_heads swa_num_key_value_heads "
        "num_experts_per_tok num_experts_per_token moe_topk top_k_experts n_groups",
    ),
    (
        1,
        "n_shared_experts num_shared_experts moe_num_shared_experts first_k_dense_replace num_dense_layers "
        "n_group topk_group num_expert_group hash_moe_layers mamba_n_groups",
    ),
    (
        SIZE,
        "head_dim global_head_dim kv_channels d_kv attention_head_dim swa_head_dim v_head_dim qk_rope_head_dim "
        "qk_nope_head_dim rotary_dim index_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim d_rel "
        "dim_head mamba_d_state ssm_state_size state_size mamba_chunk_size chunk_size index_topk sliding_window "
        "sliding_window_size window_size attention_window_size local_attention_window_len",
    ),
    (
        16,
        "qk_head_dim q_lora_rank kv_lora_rank o_lora_rank laurel_rank mamba_d_head mamba_head_dim gated_norm_rank "
        "rel_extent mamba_dt_rank",
    ),
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers "
        "num_decoder_layers depth",
    ),
    (
        LENGTH,
        "max_position_embeddings n_positions n_ctx seq_length max_seq_len model_max_length "
        "original_max_position_embeddings max_source_positions max_target_positions",
    ),
    (
        INNER,
        "intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim moe_intermediate_size d_ff dim_ff "
        "shared_expert_intermediate_size ffn_hidden_size shared_intermediate_size moe_shared_expert_intermediate_size "
        "intermediate_size_mlp block_ff_dim expert_ffn_hidden_size shared_experts_intermediate_size d_inner",
    ),
    (EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num moe_num_primary_experts"),
    (0, "num_kv_shared_layers pad_token_id mlp_only_layers"),
    (2, "o_groups patch_size num_nextn_predict_layers attn_layer_period attn_layer_offset"),
]
SMALL = {name: size for size, names in _NAMES for name in names.split()}
_MOSTLY_MAMBA = {"layer_types": ["linear_attention", "full_attention"] * 2}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
DEFAULTS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": GROUPS, "rope_theta": 10_000.0, "clip_qkv": 8.0}},
    "ernie4_5_moe": {"moe_k": 2},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16},
    "gemma4_text": {"global_head_dim": 2 * SIZE},
    "gemma4_unified_text": {"global_head_dim": 2 * SIZE},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": _MOSTLY_MAMBA,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"head_dim": 16, "num_heads": 4},
    "mellum": {"num_nextn_predict_layers": None},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16]},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {"mamba_expand": 2, "n_mamba_heads": 2, "attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {"n_mamba_heads": 8, "mamba_headdim": 8, "mamba_d_state": 8},
}
NOT_MADE = {  # types of which no tiny model is made, and why
    **dict.fromkeys(("musicgen", "musicgen_melody"), "it is several models, and what it makes is sound"),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "it is a draft of another model"),
    "dots3_note": "its language model is dots3_note_text",
    "gemma3n": "its language model is gemma3n_text; the whole needs the package timm",
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # of types whose attention has several forms
    "falcon, in groups": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": GROUPS}),
    "falcon, alibi": ("falcon", {"alibi": True, "multi_query": False, "num_kv_heads": HEADS}),
    "falcon_h1, keys scaled": ("falcon_h1", {"key_multiplier": 0.5}),
    "gpt_bigcode, many keys": ("gpt_bigcode", {"multi_query": False}),
    "gpt2, scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "cohere, normed": ("cohere", {"use_qk_norm": True}),
    "stablelm, normed": ("stablelm", {"qk_layernorm": True}),
    "phi, normed": ("phi", {"qk_layernorm": True}),
    "qwen3, wide heads": ("qwen3", {"head_dim": 2 * SIZE}),
    "llama, biased": ("llama", {"attention_bias": True}),
    "gemma4, values from keys": ("gemma4_text", {"attention_k_eq_v": True}),
}


def config_of(name: str) -> Any:
    """A tiny configuration of a type, or of a variant of one."""
    name, variant = VARIANTS.get(name, (name, {}))
    kind = CONFIG_MAPPING[name]
    own = DEFAULTS.get(name, {}) | variant
    small = _small(kind())
    nested = "text_config" in small and name.removesuffix("_text") + "_text" in DEFAULTS
    if nested:
        small["text_config"] |= DEFAULTS[f"{name}_text"]
    return kind(**(small | own))


def _small(default: Any) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for key in default.to_dict():
        if key in ("transformers_version", "model_type", "per_layer_config"):
            continue
        try:
            value = getattr(default, key, None)
        except AmbiguousGlobalPerLayerAttributeError:
            value = None
        if isinstance(value, PreTrainedConfig):
            small[key] = _small(value)
        elif key in ("layer_types", "layers_block_type", "mlp_layer_types") and value:
            small[key] = _kinds(value)
        elif key in SMALL and not isinstance(value, (list, dict)):
            small[key] = SMALL[key]
        elif key.endswith("_token_id") and value is not None:
            small[key] = 1
    if "kv_lora_rank" in small:
        small |= dict.fromkeys(small.keys() & {"num_key_value_heads"}, HEADS)
    return small


def _kinds(names: Any) -> list[Any]:
    """Every kind of layer of a long list in a list of `LAYERS`, the last kinds first found repeated."""
    kinds = list(dict.fromkeys(names))
    return (kinds * LAYERS)[:LAYERS]


def build(name: str, seed: int = 0, **more: Any) -> Any:
    """A random model in evaluation mode."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config_of(name), **more).eval()
