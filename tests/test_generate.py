"""Generating with compiled models: the tokens are those that transformers generates."""

from __future__ import annotations

import functools

import pytest
import torch

import graphwright
from graphwright.ir.errors import InputError, OptionError, PassError

DECODERS = ["llama", "gpt2", "qwen3", "mistral", "gemma3", "phi3", "opt", "mixtral", "llama-mask"]
QUICK = ("llama", "gpt2")
NEW = 20


@pytest.fixture(scope="module")
def compiled(built, families):
    """Return a family's model, compiled to generate, by name."""

    @functools.cache
    def make(name: str):
        return graphwright.compile(built(name), **families[name].sample(2, 9, 0), check=False, generate=True)

    return make


def prompts(batch: int, tokens: int) -> torch.Tensor:
    """Return random prompts, [batch, tokens]."""
    return torch.randint(3, 97, (batch, tokens), generator=torch.Generator().manual_seed(batch * 100 + tokens))


def reference(model, ids: torch.Tensor, **options) -> torch.Tensor:
    """Return what transformers generates."""
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, **{"do_sample": False, **options})


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in DECODERS])
def test_greedy_tokens_are_those_of_transformers(built, compiled, name) -> None:
    """One prompt and several, of one token, of fewer and of more than a window; the tokens differ from each other."""
    seen: set[int] = set()
    for tokens in (1, 2, 7, 21):
        for batch in (1, 2):
            ids = prompts(batch, tokens)
            expected = reference(built(name), ids)
            assert torch.equal(compiled(name).generate(ids, max_new_tokens=NEW), expected)
            seen |= set(expected[:, tokens:].flatten().tolist())
    assert len(seen) > 5


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in DECODERS])
def test_padded_prompts_are_continued_as_if_alone(compiled, name) -> None:
    """Padding before or behind a prompt changes nothing, whatever stands there."""
    model, ids, mask = compiled(name), prompts(4, 17), torch.ones(4, 17, dtype=torch.long)
    mask[0, :4] = mask[1, :11] = mask[3, 9:] = 0
    got = model.generate(ids, attention_mask=mask, max_new_tokens=12)
    assert torch.equal(got[:, :17], ids)
    for row in range(4):
        alone = model.generate(ids[row : row + 1, mask[row].bool()], max_new_tokens=12)
        assert torch.equal(got[row, 17:], alone[0, -12:])


def test_the_model_can_still_be_called(built, compiled) -> None:
    """The plain program is there too."""
    ids = prompts(2, 11)
    with torch.no_grad():
        expected = built("llama")(ids, use_cache=False).logits
    torch.testing.assert_close(compiled("llama")(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_sequences_end_at_their_ends(built, compiled) -> None:
    """A token or a sequence of tokens ends a sequence; others of the batch go on, and padding follows it."""
    ids = prompts(2, 7)
    free = compiled("llama").generate(ids, max_new_tokens=NEW)
    end = int(free[0, 7 + 4])
    expected = reference(built("llama"), ids, eos_token_id=end, pad_token_id=1)
    assert torch.equal(compiled("llama").generate(ids, max_new_tokens=NEW, eos_token_id=end, pad_token_id=1), expected)
    pair = free[0, 10:12].tolist()
    stopped = compiled("llama").generate(ids[:1], max_new_tokens=NEW, stop_sequences=[pair])
    answer = free[0, 7:].tolist()
    first = next(at for at in range(1, len(answer)) if answer[at - 1 : at + 1] == pair)
    assert stopped[0, 7:].tolist() == answer[: first + 1]


def test_drawn_tokens_follow_the_seed(compiled) -> None:
    """One seed gives the same tokens each time, another seed others; the likeliest alone is greedy."""
    model, ids = compiled("llama"), prompts(2, 5)
    drawn = [model.generate(ids, max_new_tokens=NEW, do_sample=True, temperature=3.0, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    only = model.generate(ids, max_new_tokens=NEW, do_sample=True, top_k=1)
    assert torch.equal(only, model.generate(ids, max_new_tokens=NEW))


def test_tokens_come_as_they_are_made(compiled) -> None:
    """The streamer is called with each step's tokens, in order."""
    ids, got = prompts(2, 5), []
    result = compiled("llama").generate(ids, max_new_tokens=6, streamer=got.append)
    assert torch.equal(torch.stack(got, 1), result[:, 5:])
    steps = compiled("llama").generator.stream(ids, max_new_tokens=6)
    assert torch.equal(next(steps), result[:, 5])


def test_calls_do_not_disturb_each_other(compiled) -> None:
    """A call that is under way keeps its caches while others run; caches are used again, in and out of inference mode."""
    model, ids = compiled("llama"), prompts(2, 9)
    expected = model.generate(ids, max_new_tokens=8)
    model.generator.release()
    steps = model.generator.stream(ids, max_new_tokens=8)
    first = [next(steps), next(steps)]
    with torch.inference_mode():
        assert torch.equal(model.generate(ids, max_new_tokens=8), expected)
    assert torch.equal(model.generate(prompts(2, 3), max_new_tokens=8)[:, :3], prompts(2, 3))
    assert torch.equal(torch.stack([*first, *steps], 1), expected[:, 9:])
    assert torch.equal(model.generate(ids, max_new_tokens=8), expected)


def test_long_answers_make_room(compiled, monkeypatch) -> None:
    """What is kept is moved when the caches grow."""
    from graphwright.runtime import generation, kv_cache

    ids = prompts(2, 5)
    expected = compiled("llama").generate(ids, max_new_tokens=40)
    monkeypatch.setattr(kv_cache, "STEP", 8)
    monkeypatch.setattr(generation, "FIRST_ROOM", 1)
    compiled("llama").generator.release()
    assert torch.equal(compiled("llama").generate(ids, max_new_tokens=40), expected)


def test_a_saved_model_generates_the_same(compiled, tmp_path) -> None:
    """A file has all programs, and what ends sequences."""
    ids = prompts(2, 6)
    compiled("llama").save(tmp_path / "model.gw")
    loaded = graphwright.load(tmp_path / "model.gw")
    assert torch.equal(loaded.generate(ids, max_new_tokens=NEW), compiled("llama").generate(ids, max_new_tokens=NEW))
    assert loaded.generator.ending == compiled("llama").generator.ending
    torch.testing.assert_close(loaded(ids).logits, compiled("llama")(ids).logits, rtol=0, atol=0)


def test_what_does_not_fit_is_refused(compiled) -> None:
    """Prompts of another kind, masks with gaps, no room, and options out of range; each message says what to do."""
    model, ids = compiled("llama"), prompts(2, 5)
    assert torch.equal(model.generate(ids, max_new_tokens=0), ids)
    with pytest.raises(InputError, match="int64 \\[batch, tokens\\]"):
        model.generate(ids.int(), max_new_tokens=1)
    with pytest.raises(InputError, match="at least one prompt"):
        model.generate(ids[:, :0], max_new_tokens=1)
    with pytest.raises(InputError, match="without gaps"):
        model.generate(ids, max_new_tokens=1, attention_mask=torch.tensor([[1, 0, 1, 1, 1]] * 2))
    with pytest.raises(InputError, match="all padding"):
        model.generate(ids, max_new_tokens=1, attention_mask=torch.tensor([[0] * 5, [1] * 5]))
    with pytest.raises(OptionError, match="temperature"):
        model.generate(ids, max_new_tokens=1, do_sample=True, temperature=0.0)
    with pytest.raises(OptionError, match="max_new_tokens"):
        model.generate(ids, max_new_tokens=-1)


def test_a_budget_beyond_the_positions_is_refused_at_once(compiled) -> None:
    """Before anything is computed, whatever the first room is; the message says what would fit, and that fits."""
    model, ids = compiled("gpt2"), prompts(2, 200)
    with pytest.raises(InputError, match=r"room for 256 tokens.*longest prompt has 200.*would need room for 299.*at most 57"):
        model.generate(ids, max_new_tokens=100)
    with pytest.raises(InputError, match="at most 57"):
        model.generator.stream(ids, max_new_tokens=10_000)
    assert model.generate(ids, max_new_tokens=57).shape == (2, 257)
    with pytest.raises(InputError, match=r"room for 256 tokens.*longest prompt has 300\. Shorten it"):
        model.generate(prompts(1, 300), max_new_tokens=1)
    # Padding takes no position.
    mask = torch.ones(1, 300, dtype=torch.long)
    mask[:, :60] = 0
    assert model.generate(prompts(1, 300), attention_mask=mask, max_new_tokens=17).shape == (1, 317)
    with pytest.raises(InputError, match=r"longest prompt has 240.*at most 17"):
        model.generate(prompts(1, 300), attention_mask=mask, max_new_tokens=18)


def test_a_model_that_was_not_compiled_for_it_says_so(built, families) -> None:
    """Without generate=True there is nothing to generate with; an encoder cannot be compiled for it."""
    plain = graphwright.compile(built("llama"), **families["llama"].sample(2, 9, 0), check=False)
    with pytest.raises(InputError, match="generate=True"):
        plain.generate(prompts(1, 4), max_new_tokens=1)
    with pytest.raises(PassError, match="the attention is not causal"):
        graphwright.compile(built("bert"), **families["bert"].sample(2, 9, 0), check=False, generate=True)


@pytest.mark.slow
def test_a_trained_model_writes_the_same_text() -> None:
    """64 tokens of the language model that comes with the checkout, in float32."""
    from graphwright.tools import reference as trained

    model = trained.load_language_model().float().eval()
    ids = trained.held_out_ids(96).reshape(1, -1)
    compiled = graphwright.compile(model, input_ids=ids, use_cache=False, check=False, generate=True)
    mask = torch.ones_like(ids)
    expected = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=64, eos_token_id=None)
    assert torch.equal(compiled.generate(ids, max_new_tokens=64, eos_token_id=()), expected)
