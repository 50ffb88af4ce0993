"""The models of docs/models.md: every family of tests/families.py at a size at which its time says something."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

BATCH, TOKENS = 2, 64

VOCABULARY = 1024

Inputs = dict[str, Any]

_WIDTH = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8}
_TEXT = {**_WIDTH, "vocab_size": VOCABULARY, "intermediate_size": 1024, "max_position_embeddings": 512}
_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
_DECODER = {**_TEXT, **_IDS, "num_key_value_heads": 4}
_MOE = {**_DECODER, "intermediate_size": 512, "num_experts_per_tok": 2}
_IMAGE = {**_WIDTH, "image_size": 64, "patch_size": 8}

CONFIGURATIONS: dict[str, tuple[str, str, Mapping[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "llama-mask": ("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_DECODER, "head_dim": 32}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_DECODER, "sliding_window": 24}),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            **_DECODER,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _DECODER),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {**_IDS, "vocab_size": VOCABULARY, "n_positions": 512, "n_embd": 256, "n_layer": 4, "n_head": 8},
    ),
    "opt": ("OPTForCausalLM", "OPTConfig", {**_TEXT, **_IDS, "ffn_dim": 1024, "word_embed_proj_dim": 256}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_MOE, "num_local_experts": 4}),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**_MOE, "head_dim": 32, "num_experts": 4, "moe_intermediate_size": 256},
    ),
    "mamba2": (
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {
            **_IDS,
            "vocab_size": VOCABULARY,
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "state_size": 32,
            "num_heads": 16,
            "head_dim": 32,
            "n_groups": 2,
            "chunk_size": 32,
        },
    ),
    "bert": ("BertForMaskedLM", "BertConfig", _TEXT),
    "deberta-v2": (
        "DebertaV2Model",
        "DebertaV2Config",
        {
            **_TEXT,
            "relative_attention": True,
            "position_buckets": 32,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
        },
    ),
    "vit": ("ViTModel", "ViTConfig", {**_IMAGE, "intermediate_size": 1024}),
    "dinov2": ("Dinov2Model", "Dinov2Config", _IMAGE),
    "clip-vision": ("CLIPVisionModel", "CLIPVisionConfig", {**_IMAGE, "intermediate_size": 1024}),
    "swin": (
        "SwinModel",
        "SwinConfig",
        {"image_size": 64, "patch_size": 4, "embed_dim": 64, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 256,
            "d_kv": 32,
            "d_ff": 1024,
            "num_layers": 4,
            "num_heads": 8,
            "decoder_start_token_id": 0,
        },
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": VOCABULARY,
            "d_model": 256,
            "encoder_layers": 4,
            "decoder_layers": 4,
            "encoder_attention_heads": 8,
            "decoder_attention_heads": 8,
            "encoder_ffn_dim": 1024,
            "decoder_ffn_dim": 1024,
            "num_mel_bins": 80,
            "max_source_positions": 64,
            "max_target_positions": 128,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
    ),
}
"""Family -> model class, configuration class, options; both classes of transformers."""


@dataclass(frozen=True)
class Sized:
    """A model of a row.

    Args:
        title: what it is.
        build: makes it, in evaluation mode, with random weights.
        sample: (batch, tokens, seed) -> named arguments of a call.
    """

    title: str
    build: Callable[[], nn.Module]
    sample: Callable[[int, int, int], Inputs]


class _Encoder(nn.Module):
    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(256, 8, 1024, batch_first=True, norm_first=norm_first, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.encoder(x)
        return result


def _pixels(batch: int, tokens: int, seed: int) -> Inputs:
    """Images of 64 x 64, whatever the number of tokens."""
    del tokens
    return {"pixel_values": torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(seed))}


def _sound(batch: int, tokens: int, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_features": torch.randn(batch, 80, 128, generator=generator),
        "decoder_input_ids": torch.randint(3, VOCABULARY, (batch, tokens), generator=generator),
        "use_cache": False,
    }


def _features(batch: int, tokens: int, seed: int) -> Inputs:
    return {"x": torch.randn(batch, tokens, 256, generator=torch.Generator().manual_seed(seed))}


def sized(name: str, family: Any) -> Sized:
    """Return a family at the size of the table.

    Args:
        name: of the family.
        family: what tests/families.py has of it: it gives the inputs of language models, and what has one size only.
    """
    if name in CONFIGURATIONS:
        model, configuration, options = CONFIGURATIONS[name]
        sample = _sound if name == "whisper" else _pixels if "image_size" in options else family.sample
        return Sized(model, lambda: _hugging_face(model, configuration, options), sample)
    if name.startswith("encoder-"):
        return Sized("nn.TransformerEncoder", lambda: _seeded(lambda: _Encoder(name == "encoder-pre-norm")), _features)
    if name == "convnet":
        return Sized("a small network of convolutions", family.build, _pixels)
    return Sized("one small attention, written out", family.build, family.sample)


def _hugging_face(model: str, configuration: str, options: Mapping[str, Any]) -> nn.Module:
    import transformers

    return _seeded(lambda: getattr(transformers, model)(getattr(transformers, configuration)(**options)))


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()
