"""Train the small reference language model on the source of Python's standard library.

Usage: python tests/models/train_pystdlib_llama.py FOLDER MINUTES
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from graphwright.tools import reference

VOCABULARY = 2048
FILE_TOKEN = "<|file|>"
PEAK_RATE = 1.5e-3
WARM_UP_STEPS = 100


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Return a byte-level BPE tokenizer trained on `texts`; FILE_TOKEN gets number 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[FILE_TOKEN], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Return the tokens of all texts, int64 [tokens], FILE_TOKEN before each text."""
    return torch.tensor([token for text in tokenizer.encode_batch(texts) for token in (0, *text.ids)])


def make_model() -> LlamaForCausalLM:
    """Return the model with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=8,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=4096,
            rope_theta=10000.0,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Return AdamW that leaves the weights of norms undecayed."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95))


def batch_shape(done: float) -> tuple[int, int]:
    """Return (context, sequences) for the share `done` of the time: contexts grow towards the end."""
    return (256, 16) if done < 0.6 else (1024, 4) if done < 0.88 else (2048, 2)


def learning_rate(step: int, done: float) -> float:
    """Return the rate: a linear warm-up, then half a cosine down to 5 % of the peak."""
    return PEAK_RATE * min(1, (step + 1) / WARM_UP_STEPS) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokens: torch.Tensor, context: int = 1024, windows: int = 8) -> float:
    """Return the loss over the first windows of `tokens`, in nats per token."""
    model.eval()
    total = 0.0
    for k in range(windows):
        window = tokens[k * context : (k + 1) * context + 1][None]
        total += functional.cross_entropy(model(window[:, :-1]).logits[0], window[0, 1:]).item()
    model.train()
    return total / windows


def main(out: Path, minutes: float) -> None:
    """Train for `minutes` and write a Hugging Face folder to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_num_threads(2)
    files = reference.library_files()
    texts = [file.text for file in files if not file.held_out]
    tokenizer = train_tokenizer(texts)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=FILE_TOKEN, eos_token=FILE_TOKEN).save_pretrained(out)
    tokens = encode(tokenizer, texts)
    held_out = encode(tokenizer, [file.text for file in files if file.held_out])
    print(f"{len(tokens)} tokens to train on, {len(held_out)} held out", flush=True)

    model = make_model().train()
    optimizer = make_optimizer(model)
    step = seen = 0
    start = time.time()
    while (done := (time.time() - start) / (minutes * 60)) < 1:
        context, sequences = batch_shape(done)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, done)
        starts = torch.randint(0, len(tokens) - context - 1, (sequences,))
        batch = torch.stack([tokens[i : i + context + 1] for i in starts])
        loss = functional.cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        seen += context * sequences
        if step % 100 == 0:
            print(f"{done:.0%} step {step}, {seen / 1e6:.2f}M tokens, context {context}, loss {loss.item():.3f}", flush=True)

    nats = evaluate(model, held_out)
    model.to(torch.float16).save_pretrained(out)
    record = {
        "tokens_seen": seen,
        "steps": step,
        "eval_nats_per_token": nats,
        "train_tokens": len(tokens),
        "eval_tokens": len(held_out),
        "python": sys.version.split()[0],
    }
    (out / "training.json").write_text(json.dumps(record, indent=1))
    print(f"{nats:.3f} nats per token", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
