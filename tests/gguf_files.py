"""A small Llama as a GGUF file, written here as llama.cpp's converter writes one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gguf import GGUFWriter
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def small_llama(**more: Any) -> LlamaForCausalLM:
    """A random Llama of 2 layers, width 32, 4 query and 2 key heads, 64 positions and 300 entries."""
    torch.manual_seed(0)
    told = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "rope_theta": 1000.0, "bos_token_id": 1,
        "eos_token_id": 2, "initializer_range": 0.2,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(told | more))).eval()


def _pairs(weight_DD: Tensor, heads: int) -> Tensor:
    """Rows in GGUF's order: the two channels that a rotation turns stand next to each other."""
    return weight_DD.view(heads, 2, -1, weight_DD.shape[1]).transpose(1, 2).reshape(weight_DD.shape)


def write_gguf(file: Path, model: LlamaForCausalLM, *, without: str = "nothing") -> None:
    """Write a model and a byte-level tokenizer of its size; leave out the tensor of one name."""
    config = model.config
    writer = GGUFWriter(file, "llama")
    writer.add_name("small")
    writer.add_license("apache-2.0")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    merges = [(first, second) for first in "eta" for second in "abcdefghijklmnopqrstuvwxyz"]
    merges = merges[: config.vocab_size - 3 - 256]
    entries = ["<unk>", "<bos>", "<eos>", *sorted(ByteLevel.alphabet()), *map("".join, merges)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(entries)
    writer.add_token_types([3, 3, 3] + [1] * (len(entries) - 3))
    writer.add_token_merges(list(map(" ".join, merges)))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    tensors = {"token_embd.weight": model.model.embed_tokens.weight, "output_norm.weight": model.model.norm.weight}
    if not config.tie_word_embeddings:
        tensors["output.weight"] = model.lm_head.weight
    for layer, block in enumerate(model.model.layers):
        for theirs, name in NAMES.items():
            weight = block.get_submodule(theirs).weight
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name)
            tensors[f"blk.{layer}.{name}.weight"] = weight if heads is None else _pairs(weight, heads)
    for name, tensor in tensors.items():
        if name != without:
            writer.add_tensor(name, tensor.detach().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
