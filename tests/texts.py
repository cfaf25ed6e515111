"""Text as stages find it: a folder of tokens, a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np


def write_tokens(folder: Path, **splits: Any) -> Path:
    """The folder, made where it is absent, with a file of 16-bit tokens for each split: `train=[1, 2, 3]`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tokens in splits.items():
        np.asarray(tokens, dtype=np.uint16).tofile(folder / f"{name}.bin")
    (folder / "tokens.json").write_text(json.dumps({"dtype": "uint16"}))
    return folder


def random_tokens(count: int, above: int = 300) -> Any:
    """The same random tokens from 1 to `above` - 1 each time, (count,)."""
    return np.random.default_rng(0).integers(1, above, count)


def save_tokenizer(folder: Path, texts: Iterable[str], entries: int) -> None:
    """Save a tokenizer that was trained on the texts, with the end of text first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>").save_pretrained(folder)
