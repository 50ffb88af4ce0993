"""The second half of the demo: passes that make models do less work, one by one and together, and what that costs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import graphwright
from graphwright.ir.errors import InputError
from graphwright.runtime.generation import Generator
from graphwright.runtime.kv_cache import cache_bytes
from graphwright.runtime.session import Session

from . import reference, sentences
from .bench.decode.case import Case, Decoded, prompts_of, streamed
from .bench.decode.rivals import GENERATE, RIVALS
from .bench.models.measure import rounds
from .output import table

PYTORCH, PLAIN = "PyTorch", "as it is"

ENCODER_WAYS: Mapping[str, tuple[str, ...]] = {
    PLAIN: (),
    "fewer tokens": ("merge-tokens:r=28,metric=tokens",),
    "fewer tokens and layers": ("merge-tokens:r=28,metric=tokens", "drop-layers:drop=1,unit=attention"),
}
"""How the sentence encoder is compiled; the last is the recipe docs/recipes/sentence-encoder.toml."""

DECODER_WAYS: Mapping[str, tuple[str, ...]] = {
    PLAIN: (),
    "sparse prompt": ("vertical-slash:vertical=30,slash=64",),
    "fewer layers": ("drop-layers:drop=1,unit=attention,score=leave-one-out",),
    "cache of 4 bits": ("quantize-cache:bits=4",),
    "cache of two tiers": ("tier-cache",),
    "all of it": (
        "drop-layers:drop=1,unit=attention,score=leave-one-out",
        "vertical-slash:vertical=30,slash=64",
        "quantize-cache:budget_bytes_per_token=768",
    ),
}
"""How the language model is compiled; the last is the recipe docs/recipes/language-model.toml."""

TOKENS, BATCH, BATCHES, QUICK_BATCHES = 256, 8, 12, 2
"""Tokens of a text, texts of a call, and calls, for the encoder."""

PROMPT, NEW, SEQUENCES, FORCED, QUICK_FORCED = 2048, 32, 4, 256, 32
"""Tokens of a prompt, tokens that are generated; sequences that the loss is taken of, and tokens in each, behind 3/4 of a
prompt."""

ROUNDS, QUICK_ROUNDS = 7, 2

Tell = Callable[[str], None]


@dataclass(frozen=True)
class EncoderWay:
    """What one way to run the encoder gives.

    Args:
        label: of the way.
        passes: what was asked for.
        call_ms: median time of a call.
        ratio: how many times as fast as PyTorch, median over rounds.
        cosine: mean similarity to PyTorch's embeddings.
        overlap: share of the ten nearest texts that are the same.
    """

    label: str
    passes: tuple[str, ...]
    call_ms: float
    ratio: float
    cosine: float
    overlap: float


@dataclass(frozen=True)
class DecoderWay:
    """What one way to run the language model gives.

    Args:
        label: of the way.
        passes: what was asked for.
        prompt_ms: median time from the prompt to the first token.
        prompt_ratio: how many times as fast as transformers.
        tokens_per_s: new tokens in a second after the first, median.
        decode_ratio: how many times as fast as transformers.
        cache_bytes_per_token: what each token takes in the caches.
        cache_bytes_per_sequence: what a sequence takes beyond that.
        loss: nats per token of text that was not learnt, each token from what is in the caches.
        same_tokens: share of the new tokens that are those of transformers.
    """

    label: str
    passes: tuple[str, ...]
    prompt_ms: float
    prompt_ratio: float
    tokens_per_s: float
    decode_ratio: float
    cache_bytes_per_token: float
    cache_bytes_per_sequence: float
    loss: float
    same_tokens: float


@dataclass(frozen=True)
class Less:
    """What less work gives.

    Args:
        encoder: a row for PyTorch, and for each of `ENCODER_WAYS`.
        decoder: a row for transformers, and for each of `DECODER_WAYS`; none if the language model is not there.
        missing: why it is not; "" if it is.
    """

    encoder: list[EncoderWay]
    decoder: list[DecoderWay]
    missing: str = ""


def run(*, quick: bool = False, tell: Tell = lambda text: None) -> Less:
    """Run both models in all ways.

    Args:
        quick: take less text and fewer rounds.
        tell: called with what is being done now.

    Raises:
        InputError: the encoder's weights are not installed.
    """
    with torch.no_grad():
        encoder = _encoder(quick, tell)
        try:
            reference.language_model_folder()
        except InputError as error:
            return Less(encoder, [], str(error))
        return Less(encoder, _decoder(quick, tell))


def _encoder(quick: bool, tell: Tell) -> list[EncoderWay]:
    model = sentences.load_encoder()
    calls = _long_texts((QUICK_BATCHES if quick else BATCHES) + 1)
    calibration, calls = calls[:1], calls[1:]
    runs: dict[str, Callable[..., torch.Tensor]] = {PYTORCH: model}
    for label, passes in ENCODER_WAYS.items():
        tell(f"compiling the encoder: {label}")
        runs[label] = graphwright.compile(model, *calls[0].values(), passes=passes, calibration=calibration)
    found = {}
    for label, call in runs.items():
        tell(f"embedding texts: {label}")
        found[label] = torch.cat([call(**inputs) for inputs in calls])
    first = calls[0]
    timed: dict[str, Callable[[], torch.Tensor]] = {label: _bound(call, first) for label, call in runs.items()}
    samples, _ = rounds(timed, torch.get_num_threads(), QUICK_ROUNDS if quick else ROUNDS, tell)
    return [
        EncoderWay(
            label,
            ENCODER_WAYS.get(label, ()),
            statistics.median(samples[label]) * 1e3,
            _ratio(samples[PYTORCH], samples[label]),
            float(torch.cosine_similarity(found[label], found[PYTORCH]).mean()),
            _overlap(found[label], found[PYTORCH]),
        )
        for label in runs
    ]


def _bound(call: Callable[..., torch.Tensor], inputs: Mapping[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    return lambda: call(**inputs)


def _ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def _long_texts(count: int) -> list[dict[str, torch.Tensor]]:
    """Return calls with docstrings that fill them: without padding."""
    tokenizer = reference.load_minilm_tokenizer()
    rows = []
    for document in reference.each_docstring():
        ids = tokenizer(document.text, truncation=True, max_length=TOKENS)["input_ids"]
        if len(ids) == TOKENS:
            rows.append(ids)
        if len(rows) == count * BATCH:
            break
    parts = torch.split(torch.tensor(rows), BATCH)
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in parts]


def _overlap(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the share of each text's ten nearest others, by the expected vectors, that are among its ten nearest."""
    count = min(10, len(found) - 1)
    nearest = [(vectors @ vectors.T).fill_diagonal_(-2).topk(count).indices for vectors in (found, expected)]
    same = (nearest[0][:, :, None] == nearest[1][:, None, :]).any(-1)
    return float(same.float().mean())


def _decoder(quick: bool, tell: Tell) -> list[DecoderWay]:
    model = reference.load_language_model()
    case = Case(model, prompts_of(model, 1, PROMPT + NEW, NEW), NEW, torch.get_num_threads())
    forced = QUICK_FORCED if quick else FORCED
    length = PROMPT * 3 // 4 + forced
    text = reference.held_out_ids(PROMPT + (SEQUENCES + 1) * length)[PROMPT:].view(-1, length)
    calibration = [{"input_ids": text[-1:]}]
    compiled = {}
    for label, passes in DECODER_WAYS.items():
        tell(f"compiling the language model: {label}")
        compiled[label] = graphwright.compile(
            model, input_ids=text[:1, :64], passes=passes, calibration=calibration, generate=True
        )
    runs = {PYTORCH: RIVALS[GENERATE](case), **{label: _continues(case, made) for label, made in compiled.items()}}
    losses = {PYTORCH: _plain_loss(model, text[:-1])}
    for label, made in compiled.items():
        tell(f"reading text through the caches: {label}")
        losses[label] = _forced_loss(_generator(made), text[:-1])
    samples: dict[str, list[Decoded]] = {label: [] for label in runs}
    for count in range(1 + (QUICK_ROUNDS if quick else ROUNDS)):
        tell(f"generating, round {count}")
        for label in runs if count % 2 else reversed(runs):
            result = runs[label]()
            if count:
                samples[label].append(result)
    theirs = samples[PYTORCH]
    rows = []
    for label, taken in samples.items():
        memory = None if label == PYTORCH else cache_bytes(_generator(compiled[label]).step.signature)
        config = model.config
        plain_bytes = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        rows.append(
            DecoderWay(
                label,
                DECODER_WAYS.get(label, ()),
                statistics.median(s.first_s for s in taken) * 1e3,
                _ratio([s.first_s for s in theirs], [s.first_s for s in taken]),
                (NEW - 1) / statistics.median(s.rest_s for s in taken),
                _ratio([s.rest_s for s in theirs], [s.rest_s for s in taken]),
                memory.per_token if memory else plain_bytes,
                memory.per_sequence if memory else 0.0,
                losses[label],
                float((taken[0].tokens == theirs[0].tokens).float().mean()),
            )
        )
    return rows


def _generator(compiled: graphwright.Compiled) -> Generator:
    """Return what continues sequences; it is there, since it was asked for."""
    generator = compiled.generator
    if generator is None:
        raise InputError("the language model was not compiled to generate")
    return generator


def _continues(case: Case, compiled: Any) -> Callable[[], Decoded]:
    def generate(tell: Callable[[], None]) -> torch.Tensor:
        result: torch.Tensor = compiled.generate(
            case.prompts, max_new_tokens=case.new, eos_token_id=(), streamer=lambda tokens: tell()
        )
        return result

    return streamed(case, generate)


def _plain_loss(model: Any, text: torch.Tensor) -> float:
    """Return the loss of the tokens behind most of a prompt, in nats per token, by the original."""
    start = PROMPT * 3 // 4
    scores = model(input_ids=text).logits[:, start - 1 : -1]
    return F.cross_entropy(scores.flatten(0, 1), text[:, start:].flatten()).item()


def _forced_loss(generator: Generator, text: torch.Tensor) -> float:
    """Return the same where the tokens go through the caches one by one, as in generating."""
    rows, length = text.shape
    start = PROMPT * 3 // 4
    session = Session(generator.step, rows, length)
    last = torch.full((rows,), start - 1)
    scores = generator.prefill(text[:, :start].contiguous(), session.past, *session.cache.tensors.values(), last)
    session.past.fill_(start)
    total = 0.0
    for at in range(start, length):
        total += F.cross_entropy(scores[:, -1], text[:, at], reduction="sum").item()
        session.ids[:, 0] = text[:, at]
        scores = session.advance(at + 1, length)
    return total / (rows * (length - start))


def tables(less: Less) -> list[Any]:
    """Return what rich prints of it."""
    made = [_encoder_table(less.encoder)]
    return [*made, _decoder_table(less.decoder) if less.decoder else less.missing]


def _encoder_table(rows: Sequence[EncoderWay]) -> Any:
    columns = [f"all-MiniLM-L6-v2, {BATCH} texts of {TOKENS} tokens", "a call", "faster", "cosine", "nearest 10"]
    cells = [
        [way.label, f"{way.call_ms:.1f} ms", f"{way.ratio:.2f}", f"{way.cosine:.4f}", f"{way.overlap:.1%}"] for way in rows
    ]
    return table("fewer tokens, fewer layers", columns, cells, right=tuple(columns[1:]))


def _decoder_table(rows: Sequence[DecoderWay]) -> Any:
    exact = next(way.loss for way in rows if way.label == PYTORCH)
    columns = [f"language model, {PROMPT} tokens", "prompt", "faster", "tokens/s", "faster ", "bytes/token", "loss", "same"]
    cells = [
        [
            way.label,
            f"{way.prompt_ms:.0f} ms",
            f"{way.prompt_ratio:.2f}",
            f"{way.tokens_per_s:.0f}",
            f"{way.decode_ratio:.2f}",
            f"{way.cache_bytes_per_token:.0f}",
            f"{way.loss - exact:+.4f}",
            f"{way.same_tokens:.0%}",
        ]
        for way in rows
    ]
    return table("sparse attention, fewer layers, smaller caches", columns, cells, right=tuple(columns[1:]))
