"""What a GGUF file says of its model, as a config.json would: the plan's look at one, without torch.

Weights and tokenizer are read by transformers' own loader, in the stage that imports the teacher.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchestrator.study.loader import StudyError

TYPES = {  # of architectures that GGUF and transformers call by different names
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "gpt-oss": "gpt_oss",
    "minimax-m2": "minimax_m2",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
}
SIZES = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.value_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
}
CARD = {
    "license": "general.license",
    "license_name": "general.license.name",
    "license_link": "general.license.link",
}
ENTRIES = "tokenizer.ggml.tokens"
HEAD, GATE = "output.weight", "blk.0.ffn_gate"  # of tensors: an output head of its own, a gate in feed-forward blocks


def gguf_config(file: Path) -> dict[str, Any]:
    """The type and sizes of the model in a GGUF file, by the names of a config.json.

    A size that differs by layer is given by its largest value. Whether the output head is the embedding, and whether
    feed-forward blocks have a gate, is seen in the tensors' names. Raises `StudyError` where the file is none, or the
    package that reads such files is not installed.
    """
    fields, tensors = _read(file)
    kind = str(fields["general.architecture"].contents())
    found: dict[str, Any] = {
        "model_type": TYPES.get(kind, kind),
        "tie_word_embeddings": HEAD not in tensors,
        "hidden_act": "silu" if any(name.startswith(GATE) for name in tensors) else "gelu",
    }
    for name, theirs in SIZES.items():
        if (field := fields.get(f"{kind}.{theirs}")) is not None:
            value = field.contents()
            found[name] = max(value) if isinstance(value, list) else value
    if (field := fields.get(ENTRIES)) is not None:
        found["vocab_size"] = len(field.data)
    return found


def gguf_card(file: Path) -> dict[str, str]:
    """The licence that a GGUF file names, by the names of a model card's metadata."""
    fields, _ = _read(file)
    return {name: str(fields[theirs].contents()) for name, theirs in CARD.items() if theirs in fields}


def _read(file: Path) -> tuple[dict[str, Any], frozenset[str]]:
    """What is told at the head of a GGUF file, by name, and the names of its tensors."""
    try:
        from gguf import GGUFReader  # of the extra `gguf`
    except ImportError:
        raise StudyError(
            "teacher.gguf: reading GGUF files needs the package gguf: pip install 'layerswap[gguf]'"
        ) from None
    try:
        reader = GGUFReader(file)
        fields: dict[str, Any] = reader.fields
        fields["general.architecture"]
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise StudyError(f"teacher.gguf: {file} is no GGUF file, or torn ({error}): copy it again") from error
    return fields, frozenset(tensor.name for tensor in reader.tensors)
