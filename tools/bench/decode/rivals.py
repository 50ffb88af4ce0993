"""Who decodes: transformers in three ways, onnxruntime, and we."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from .case import Case, Run, looped, streamed
from .onnx_decoder import onnx_decoder

OURS = "graphwright"
GENERATE = "generate"


def _ours(case: Case) -> Run:
    compiled = compile_ours(case.model)

    def generate(tell: Callable[[], None]) -> torch.Tensor:
        return compiled.generate(  # type: ignore[no-any-return]
            case.prompts, max_new_tokens=case.new, eos_token_id=(), streamer=lambda tokens: tell()
        )

    return streamed(case, generate)


@functools.lru_cache(maxsize=1)
def compile_ours(model: Any) -> Any:
    """Return a language model compiled by Graphwright to generate; the last one is kept."""
    import graphwright

    sample = torch.arange(32)[None] % model.config.vocab_size
    return graphwright.compile(model, input_ids=sample, use_cache=False, check=False, generate=True)


class _Teller:
    """A streamer of transformers that tells of every token, but not of the prompts, which come first."""

    def __init__(self, tell: Callable[[], None]) -> None:
        self._prompts, self._tell = True, tell

    def put(self, value: torch.Tensor) -> None:
        """Take the prompts, or the next tokens."""
        if not self._prompts:
            self._tell()
        self._prompts = False

    def end(self) -> None:
        """Take the end of all."""


def _generate(**options: Any) -> Callable[[Case], Run]:
    def build(case: Case) -> Run:
        def generate(tell: Callable[[], None]) -> torch.Tensor:
            result: torch.Tensor = case.model.generate(
                case.prompts,
                attention_mask=torch.ones_like(case.prompts),
                do_sample=False,
                max_new_tokens=case.new,
                eos_token_id=None,
                pad_token_id=0,
                streamer=_Teller(tell),
                **options,
            )
            return result

        return streamed(case, generate)

    return build


def _compiled(case: Case) -> Run:
    from transformers import StaticCache

    model = case.model
    cache: Any = StaticCache(config=model.config, max_cache_len=case.context)
    name = cache_parameter(model)

    def forward(ids: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{name: cache}).logits
        token: torch.Tensor = logits[:, -1].argmax(-1, keepdim=True)
        return token

    step = torch.compile(forward, dynamic=False)

    @torch.no_grad()
    def first() -> torch.Tensor:
        cache.reset()
        return forward(case.prompts)

    @torch.no_grad()
    def following(tokens: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = step(tokens)
        return result

    return looped(case, first, following)


def cache_parameter(model: Any) -> str:
    """Return the name of the argument by which a model of transformers takes its cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


RIVALS: dict[str, Callable[[Case], Run]] = {
    OURS: _ours,
    GENERATE: _generate(),
    "static": _generate(cache_implementation="static"),
    "compiled": _compiled,
    "onnx": onnx_decoder,
}
"""Name -> what makes a rival ready to run. What it raises is the reason why there is no number."""
