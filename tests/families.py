"""Small models with random weights, one of each family, and inputs for them. conftest.py makes fixtures of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

VOCABULARY = 97


@dataclass(frozen=True)
class Family:
    """One model.

    Args:
        build: makes it, in evaluation mode, with weights wide enough for outputs to vary.
        sample: (batch, tokens, seed) -> named arguments of a call.
        slow: capturing it takes more than a few seconds.
    """

    build: Callable[[], nn.Module]
    sample: Callable[[int, int, int], dict[str, Any]]
    slow: bool = True


def widen(model: nn.Module, factor: float = 4.0) -> nn.Module:
    """Scale the weights of a small random model up, so that its outputs depend on its inputs."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.mul_(factor * (2.5 if any(word in name for word in ("embed", "wte", "wpe", "shared")) else 1.0))
            elif "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def hugging_face(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """Return a function that makes a Hugging Face model of a configuration."""

    def build() -> nn.Module:
        import transformers

        torch.manual_seed(0)
        return widen(getattr(transformers, model)(getattr(transformers, config)(**options)))

    return build


IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    **IDS,
}
ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
VISION = {**ENCODER, "image_size": 24, "patch_size": 4}


def token_ids(batch: int, tokens: int, seed: int) -> torch.Tensor:
    """Return random token ids, [batch, tokens], none of them special."""
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def ids_only(batch: int, tokens: int, seed: int) -> dict[str, Any]:
    return {"input_ids": token_ids(batch, tokens, seed), "use_cache": False}


def ids_and_mask(batch: int, tokens: int, seed: int) -> dict[str, Any]:
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[0, tokens - tokens // 3 :] = 0
    return {"input_ids": token_ids(batch, tokens, seed), "attention_mask": mask}


def ids_and_mask_only(batch: int, tokens: int, seed: int) -> dict[str, Any]:
    return {**ids_and_mask(batch, tokens, seed), "use_cache": False}


def pixels(batch: int, tokens: int, seed: int) -> dict[str, Any]:
    del tokens
    return {"pixel_values": torch.randn(batch, 3, 24, 24, generator=torch.Generator().manual_seed(seed))}


def features(batch: int, tokens: int, seed: int) -> dict[str, Any]:
    return {"x": torch.randn(batch, tokens, 32, generator=torch.Generator().manual_seed(seed))}


def two_sequences(batch: int, tokens: int, seed: int) -> dict[str, Any]:
    encoder = ids_and_mask(batch, tokens, seed)
    return {**encoder, "decoder_input_ids": token_ids(batch, tokens + 2, seed + 1), "use_cache": False}


def sound_and_text(batch: int, tokens: int, seed: int) -> dict[str, Any]:
    sound = torch.randn(batch, 8, 40, generator=torch.Generator().manual_seed(seed))
    return {"input_features": sound, "decoder_input_ids": token_ids(batch, tokens, seed), "use_cache": False}


class TransformerEncoder(nn.Module):
    """torch's own encoder, with a padding mask."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, norm_first=norm_first, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x)


class ConvNet(nn.Module):
    """Convolutions, batch norm, pooling and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.second = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, groups=4), nn.GroupNorm(4, 16), nn.SiLU(inplace=True))
        self.head = nn.Linear(16, 10)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(pixel_values)).mean(dim=(-2, -1)))


class Attention(nn.Module):
    """Attention written out: matmul, scale, mask, softmax, matmul."""

    def __init__(self, mask: str) -> None:
        super().__init__()
        self.mask = mask
        self.qkv = nn.Linear(32, 96)
        self.out = nn.Linear(32, 32)
        self.bias = nn.Parameter(torch.randn(4, 64, 64))

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (part.view(batch, tokens, 4, 8).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        scores = q @ k.transpose(-1, -2) / math.sqrt(8)
        rows = torch.arange(tokens, device=x.device)
        if self.mask == "causal":
            scores = scores.masked_fill(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), float("-inf"))
        elif self.mask == "window":
            near = (rows[:, None] - rows[None, :]).abs() <= 3
            scores = torch.where(near, scores, torch.finfo(scores.dtype).min)
        elif self.mask == "bias":
            scores = scores + self.bias[:, :tokens, :tokens]
        elif self.mask == "lengths":
            assert lengths is not None
            scores = scores + (1.0 - (rows[None, :] < lengths[:, None])[:, None, None, :].to(scores.dtype)) * -1e9
        weights = torch.softmax(scores, dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, tokens, 32))


def with_lengths(batch: int, tokens: int, seed: int) -> dict[str, Any]:
    lengths = torch.randint(1, tokens + 1, (batch,), generator=torch.Generator().manual_seed(seed))
    return {**features(batch, tokens, seed), "lengths": lengths}


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Return a function that makes a module with the same weights each time."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return make().eval()

    return build


FAMILIES: dict[str, Family] = {
    "llama": Family(hugging_face("LlamaForCausalLM", "LlamaConfig", **DECODER), ids_only, slow=False),
    "llama-mask": Family(
        hugging_face("LlamaForCausalLM", "LlamaConfig", **DECODER),
        lambda b, t, s: {**ids_and_mask(b, t, s), "use_cache": False},
    ),
    "qwen3": Family(hugging_face("Qwen3ForCausalLM", "Qwen3Config", **DECODER, head_dim=8), ids_only),
    "mistral": Family(hugging_face("MistralForCausalLM", "MistralConfig", **DECODER, sliding_window=5), ids_only),
    "gemma3": Family(
        hugging_face(
            "Gemma3ForCausalLM",
            "Gemma3TextConfig",
            **DECODER,
            head_dim=8,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention"],
            query_pre_attn_scalar=8,
        ),
        ids_only,
    ),
    "phi3": Family(hugging_face("Phi3ForCausalLM", "Phi3Config", **DECODER), ids_only),
    "gpt2": Family(
        hugging_face(
            "GPT2LMHeadModel", "GPT2Config", vocab_size=VOCABULARY, n_positions=256, n_embd=32, n_layer=2, n_head=4, **IDS
        ),
        ids_only,
        slow=False,
    ),
    "opt": Family(
        hugging_face(
            "OPTForCausalLM",
            "OPTConfig",
            vocab_size=VOCABULARY,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            word_embed_proj_dim=32,
            **IDS,
        ),
        ids_only,
    ),
    "mixtral": Family(
        hugging_face("MixtralForCausalLM", "MixtralConfig", **DECODER, num_local_experts=4, num_experts_per_tok=2), ids_only
    ),
    "qwen3-moe": Family(
        hugging_face(
            "Qwen3MoeForCausalLM",
            "Qwen3MoeConfig",
            **DECODER,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
        ),
        ids_only,
    ),
    "mamba2": Family(
        hugging_face(
            "Mamba2ForCausalLM",
            "Mamba2Config",
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=1,
            state_size=8,
            num_heads=8,
            head_dim=8,
            expand=2,
            n_groups=2,
            chunk_size=16,
            **IDS,
        ),
        ids_only,
    ),
    "bert": Family(
        hugging_face("BertForMaskedLM", "BertConfig", **ENCODER, vocab_size=VOCABULARY, max_position_embeddings=64),
        ids_and_mask,
        slow=False,
    ),
    "deberta-v2": Family(
        hugging_face(
            "DebertaV2Model",
            "DebertaV2Config",
            **ENCODER,
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
            relative_attention=True,
            position_buckets=16,
            pos_att_type=["p2c", "c2p"],
            share_att_key=True,
            norm_rel_ebd="layer_norm",
        ),
        ids_and_mask,
    ),
    "vit": Family(hugging_face("ViTModel", "ViTConfig", **VISION), pixels, slow=False),
    "dinov2": Family(
        hugging_face(
            "Dinov2Model",
            "Dinov2Config",
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            mlp_ratio=2,
            image_size=24,
            patch_size=4,
        ),
        pixels,
    ),
    "clip-vision": Family(hugging_face("CLIPVisionModel", "CLIPVisionConfig", **VISION), pixels),
    "swin": Family(
        hugging_face(
            "SwinModel",
            "SwinConfig",
            image_size=24,
            patch_size=2,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=3,
        ),
        pixels,
    ),
    "t5": Family(
        hugging_face(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        ),
        two_sequences,
    ),
    "whisper": Family(
        hugging_face(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            vocab_size=VOCABULARY,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        sound_and_text,
    ),
    "encoder-post-norm": Family(seeded(lambda: TransformerEncoder(norm_first=False)), features, slow=False),
    "encoder-pre-norm": Family(seeded(lambda: TransformerEncoder(norm_first=True)), features),
    "convnet": Family(seeded(ConvNet), pixels, slow=False),
    "attention": Family(seeded(lambda: Attention("none")), features, slow=False),
    "attention-causal": Family(seeded(lambda: Attention("causal")), features, slow=False),
    "attention-window": Family(seeded(lambda: Attention("window")), features, slow=False),
    "attention-bias": Family(seeded(lambda: Attention("bias")), features, slow=False),
    "attention-lengths": Family(seeded(lambda: Attention("lengths")), with_lengths, slow=False),
}
