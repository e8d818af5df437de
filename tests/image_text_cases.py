"""A tiny random CLIP and SigLIP in folders, as they are published: weights, tokenizer, what the processor says."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast, SiglipConfig, SiglipModel

SIDE, TEXT_TOKENS = 32, 12
_WORDS = ["<pad>", "<s>", "</s>", "<unk>", "what", "happens", "in", "this", "video", "?", "red", "star"]
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
}
_TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": len(_WORDS),
    "max_position_embeddings": TEXT_TOKENS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def save_image_text(folder: Path, kind: str, *, seed: int = 0) -> Path:
    """`clip` or `siglip`, written by save_pretrained."""
    torch.manual_seed(seed)
    if kind == "clip":
        network = CLIPModel(CLIPConfig(text_config=_TEXT, vision_config=_VISION, projection_dim=8))
        told = {
            "image_mean": [0.48, 0.46, 0.41],
            "image_std": [0.27, 0.26, 0.28],
            "do_center_crop": True,
            "size": {"shortest_edge": SIDE},
        }
    else:
        network = SiglipModel(SiglipConfig(text_config=_TEXT, vision_config=_VISION))
        told = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": SIDE, "width": SIDE}}
    for weight in network.parameters():
        weight.data.normal_(0, 0.2)
    network.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(_WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    return folder
