"""Tiny random models, exported once per session."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import transformers as hf
from torch import nn
from torch.export import Dim, ExportedProgram

DECODER = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
PLAIN = {k: v for k, v in DECODER.items() if k != "num_key_value_heads"}
GPT = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": None, "eos_token_id": None}
ENCODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
IMAGE = {"image_size": 24, "patch_size": 8}

LANGUAGE: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)),
    "llama-eager": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, attn_implementation="eager")),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**DECODER, head_dim=8)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**DECODER, head_dim=8, query_pre_attn_scalar=8, sliding_window=5)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(
            **DECODER,
            head_dim=8,
            sliding_window=5,
            query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**DECODER, sliding_window=5)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**DECODER)),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**DECODER)),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**PLAIN, use_parallel_residual=True)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT, n_positions=256)),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=97,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            max_position_embeddings=256,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2)),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(vocab_size=97, max_position_embeddings=256, **ENCODER)),
}
VISION: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**IMAGE, **ENCODER)),
    "vit-eager": lambda: hf.ViTForImageClassification(hf.ViTConfig(**IMAGE, **ENCODER, attn_implementation="eager")),
    "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**IMAGE, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)),
    "clip": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**IMAGE, **ENCODER)),
    "siglip": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**IMAGE, **ENCODER, vision_use_head=False)),
}
TORCH: dict[str, Callable[[], nn.Module]] = {
    f"encoder-{name}": lambda first=first: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, norm_first=first), 3, enable_nested_tensor=False
    )
    for name, first in (("post-norm", False), ("pre-norm", True))
}


def _export(name: str) -> ExportedProgram:
    torch.manual_seed(0)
    both = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    arguments: tuple[torch.Tensor, ...] = ()
    shapes: object
    if name in LANGUAGE:
        model, inputs, shapes = LANGUAGE[name](), {"input_ids": torch.randint(3, 97, (3, 11))}, {"input_ids": both}
        if name != "bert":
            inputs, shapes = inputs | {"use_cache": False}, shapes | {"use_cache": None}
    elif name in VISION:
        model, inputs = VISION[name](), {"pixel_values": torch.randn(3, 3, 24, 24)}
        shapes = {"pixel_values": {0: Dim.DYNAMIC}}
    else:
        model, inputs, arguments, shapes = TORCH[name](), {}, (torch.randn(3, 11, 32),), (both,)
    return torch.export.export(model.eval(), arguments, inputs, dynamic_shapes=shapes, strict=False)


@pytest.fixture(scope="session")
def exported() -> Callable[[str], ExportedProgram]:
    """Export a model of the tables above by its name; the same program every time, so tests must not change it."""
    return functools.cache(_export)
