"""Generating text: a prompt goes through a program once, and then token after token."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from graphwright.ir.errors import ArtifactError, InputError, OptionError
from graphwright.ir.signature import Range, Signature

from .ending import Ending
from .executable import Executable
from .kv_cache import CacheBytes, cache_bytes
from .schedule import Schedule
from .session import Session
from .token_choice import Chooser, Sampling

FIRST_ROOM = 512
"""New tokens that there is room for at first; more is made when they are there."""

LARGEST_EXCESS = 8
"""Caches with more than so many times the room that a call needs are not used for it."""

PREFILL, STEP = "prefill", "step"
"""The programs of a generator, by the names that they have in files."""

TYPICAL = {"batch": 1, "tokens": 128, "capacity": 1024}
"""Sizes that their weights are laid out for."""

Streamer = Callable[[torch.Tensor], object]


@dataclass
class _Batch:
    """What is known of each sequence."""

    done: list[bool]
    answers: list[list[int]]


class Generator:
    """Continues sequences with a model that was compiled for it.

    The caches of the last call are kept for the next one of as many sequences; `release` gives their memory back. Calls from
    several threads run beside each other, each with caches of its own.

    Args:
        prefill: the program with caches for any number of tokens, with the scores of one token of each sequence as its result.
        step: the same for one token.
        ending: what ends a sequence unless a call says otherwise.
    """

    def __init__(self, prefill: Executable, step: Executable, ending: Ending) -> None:
        self.prefill, self.step, self.ending = prefill, step, ending
        self._lock = threading.Lock()
        self._idle: Session | None = None

    def release(self) -> None:
        """Give back the memory of caches that is kept for the next call."""
        with self._lock:
            self._idle = None

    @property
    def cache_bytes(self) -> CacheBytes:
        """What the caches of one sequence take."""
        return cache_bytes(self.step.signature)

    def programs(self) -> dict[str, tuple[Schedule, Signature]]:
        """Return what `load_generator` makes an equal generator from."""
        return {name: (made.schedule, made.signature) for name, made in ((PREFILL, self.prefill), (STEP, self.step))}

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the weights of both programs by name."""
        return self.prefill.weights() | self.step.weights()

    def generate(
        self,
        input_ids: torch.Tensor,
        *,
        max_new_tokens: int,
        attention_mask: torch.Tensor | None = None,
        sampling: Sampling | None = None,
        ending: Ending | None = None,
        streamer: Streamer | None = None,
    ) -> torch.Tensor:
        """Return the prompts and what follows them.

        Args:
            input_ids: [B, S], int64.
            max_new_tokens: most tokens to generate, at least 0.
            attention_mask: [B, S], 0 where a prompt is padded, at its start or at its end; None for no padding.
            sampling: how tokens are drawn; None for the likeliest.
            ending: what ends a sequence; None for the model's own.
            streamer: called with the new tokens [B] as soon as they are known.

        Returns:
            [B, S + n], int64, n at most max_new_tokens: the prompts as they were given, then the new tokens.

        Raises:
            InputError: the prompts do not fit the model, or it has no positions for so many tokens.
        """
        new = []
        for tokens in self.stream(
            input_ids, max_new_tokens=max_new_tokens, attention_mask=attention_mask, sampling=sampling, ending=ending
        ):
            new.append(tokens)
            if streamer is not None:
                streamer(tokens)
        return torch.cat((input_ids, torch.stack(new, 1)), 1) if new else input_ids.clone()

    def stream(
        self,
        input_ids: torch.Tensor,
        *,
        max_new_tokens: int,
        attention_mask: torch.Tensor | None = None,
        sampling: Sampling | None = None,
        ending: Ending | None = None,
    ) -> Iterator[torch.Tensor]:
        """Yield the new tokens [B] of each step; the arguments are those of `generate`."""
        prompts, lengths = _left_aligned(input_ids, attention_mask)
        if max_new_tokens < 0:
            raise OptionError(f"generate: max_new_tokens must be at least 0, got {max_new_tokens}")
        width = prompts.shape[1]
        most = self._most(width, max_new_tokens)
        session = self._session(len(prompts), min(most, width + FIRST_ROOM))
        return self._tokens(prompts, lengths, session, max_new_tokens, Chooser(sampling, prompts.device), ending or self.ending)

    def _most(self, width: int, count: int) -> int:
        """Return how many tokens there must be room for in the end, for prompts of `width` tokens and `count` new ones.

        Raises:
            InputError: the model has no positions for so many.
        """
        # The last token is not put into the cache.
        most = width + max(count - 1, 0)
        limit = self.step.signature.dimensions.get("capacity", Range(1, None)).high
        if limit is None or most <= limit:
            return most
        found = f"there is room for {limit} tokens of prompt and answer, since the model has no more positions"
        if width > limit:
            raise InputError(f"generate: {found}; the longest prompt has {width}. Shorten it.")
        raise InputError(
            f"generate: {found}; the longest prompt has {width}, and max_new_tokens={count} would need room for {most}. "
            f"Shorten it, or pass max_new_tokens of at most {limit - width + 1}."
        )

    def _session(self, batch: int, room: int) -> Session:
        """Return the session of an earlier call if it fits and is free, else a new one."""
        with self._lock:
            session, self._idle = self._idle, None
        if session is not None and session.batch == batch and room <= session.cache.capacity <= LARGEST_EXCESS * room:
            return session
        with torch.inference_mode(False):
            return Session(self.step, batch, room)

    def _tokens(
        self,
        prompts: torch.Tensor,
        lengths: torch.Tensor,
        session: Session,
        count: int,
        choose: Chooser,
        ending: Ending,
    ) -> Iterator[torch.Tensor]:
        batch = _Batch([False] * len(prompts), [[] for _ in range(len(prompts))])
        longest = int(lengths.max())
        for number in range(count):
            with torch.inference_mode(False), torch.no_grad():
                if number == 0:
                    session.past.zero_()
                    scores = self.prefill(prompts, session.past, *session.cache.tensors.values(), lengths - 1)
                    session.past.copy_(lengths)
                else:
                    scores = session.advance(longest + number, longest + count)
                tokens = choose(scores[:, -1])
                finished = self._finish(tokens, batch, ending)
                session.put(tokens)
            yield tokens
            if finished:
                break
        with self._lock:
            self._idle = session

    def _finish(self, tokens: torch.Tensor, batch: _Batch, ending: Ending) -> bool:
        """Pad what comes after an end, in place, and return whether all sequences are at their end."""
        if not ending.tokens and not ending.sequences:
            return False
        for row, token in enumerate(tokens.tolist()):
            if batch.done[row]:
                tokens[row] = ending.padding
                continue
            answer = batch.answers[row]
            answer.append(token)
            if token in ending.tokens or any(tuple(answer[-len(s) :]) == s for s in ending.sequences):
                batch.done[row] = True
        return all(batch.done)


def load_generator(
    programs: Mapping[str, tuple[Schedule, Signature]], weights: Mapping[str, torch.Tensor], ending: Ending, shared: Executable
) -> Generator:
    """Return what generates.

    Args:
        programs: a schedule and a signature for each of `PREFILL` and `STEP`.
        weights: of both.
        ending: what ends a sequence.
        shared: the executable of the plain program; its weights are used where they can be.

    Raises:
        ArtifactError: a program is missing, or is not whole.
    """
    if not {PREFILL, STEP} <= programs.keys():
        raise ArtifactError(f"to generate, the programs {PREFILL} and {STEP} are needed; found {', '.join(programs) or 'none'}")
    (prefill, signature), (step, single) = programs[PREFILL], programs[STEP]
    return Generator(
        Executable(prefill, weights, signature, typical=TYPICAL, shared=shared),
        Executable(step, weights, single, typical=TYPICAL),
        ending,
    )


def _left_aligned(input_ids: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts that start in the first column, and their lengths."""
    if input_ids.dim() != 2 or input_ids.dtype != torch.int64:
        found = f"{input_ids.dtype} {list(input_ids.shape)}"
        raise InputError(f"generate: input_ids must be int64 [batch, tokens], got {found}")
    batch, width = input_ids.shape
    if batch == 0 or width == 0:
        raise InputError(f"generate: there must be at least one prompt, of at least one token, got {list(input_ids.shape)}")
    if mask is None:
        return input_ids.contiguous(), torch.full((batch,), width, device=input_ids.device)
    if mask.shape != input_ids.shape:
        raise InputError(f"generate: attention_mask must be {list(input_ids.shape)}, got {list(mask.shape)}")
    kept = mask != 0
    lengths = kept.sum(1)
    if int(lengths.min()) == 0:
        raise InputError("generate: a prompt is all padding: attention_mask has a row of zeros")
    starts = kept.int().argmax(1)
    columns = torch.arange(width, device=mask.device)
    if not torch.equal(kept, (columns >= starts[:, None]) & (columns < (starts + lengths)[:, None])):
        raise InputError("generate: attention_mask must be 0 only at the start or the end of a row, without gaps")
    moved = input_ids.gather(1, (columns + starts[:, None]) % width)
    return moved[:, : int(lengths.max())].contiguous(), lengths
