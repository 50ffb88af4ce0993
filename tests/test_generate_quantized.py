"""Generating with caches in few bits."""

from __future__ import annotations

import functools
import json

import pytest
import torch

import graphwright
from graphwright.ir.errors import InputError, OptionError
from graphwright.passes.registry import format_pass, parse_pass
from graphwright.pipeline import DEFAULT_PASSES, run_passes
from graphwright.recipe import parse_recipe
from graphwright.runtime.kv_cache import KVCache
from graphwright.runtime.session import Session
from graphwright.tools import cli

NEW = 40
SMALL = "group_size=16,residual=16"


@pytest.fixture(scope="module")
def compiled(built, families):
    """Return a family's model, compiled to generate with a pass over its caches, by name and pass."""

    @functools.cache
    def make(name: str, text: str = ""):
        sample = families[name].sample(2, 9, 0)
        return graphwright.compile(built(name), passes=[text] if text else [], check=False, generate=True, **sample)

    return make


def prompts(batch: int, tokens: int) -> torch.Tensor:
    """Return random prompts, [batch, tokens]."""
    return torch.randint(3, 97, (batch, tokens), generator=torch.Generator().manual_seed(batch * 100 + tokens))


def scores(model, ids: torch.Tensor, start: int) -> torch.Tensor:
    """Return the scores of tokens from `start` on, put in one by one behind a prompt."""
    generator = model.generator
    session = Session(generator.step, len(ids), ids.shape[1])
    session.past.zero_()
    generator.prefill(
        ids[:, :start].contiguous(), session.past, *session.cache.tensors.values(), torch.full((len(ids),), start - 1)
    )
    session.past.fill_(start)
    found = []
    for token in range(start, ids.shape[1]):
        session.ids[:, 0] = ids[:, token]
        found.append(session.advance(token + 1, ids.shape[1]).clone())
    return torch.cat(found, 1)


def test_scores_are_near_the_exact_ones(compiled) -> None:
    """Nearer with more bits, with prompts that are quantised at once and tokens that are quantised as they come."""
    ids = prompts(2, 90)
    wanted = scores(compiled("llama"), ids, 50)
    errors = [
        float((scores(compiled("llama", f"quantize-cache:bits={bits},{SMALL}"), ids, 50) - wanted).norm() / wanted.norm())
        for bits in (2, 8)
    ]
    assert errors[0] > 8 * errors[1] > 0
    assert errors[1] < 2e-3


@pytest.mark.slow
def test_answers_within_the_residual_window_are_the_same(compiled) -> None:
    """Nothing is quantised yet."""
    ids = prompts(2, 9)
    expected = compiled("llama").generate(ids, max_new_tokens=NEW)
    assert torch.equal(compiled("llama", "quantize-cache:bits=2,residual=64").generate(ids, max_new_tokens=NEW), expected)


def test_padded_prompts_are_continued_as_if_alone(compiled) -> None:
    """Padding is never quantised, nor in the ring; prompts of several lengths go on side by side."""
    model, ids, mask = compiled("llama", f"quantize-cache:bits=2,{SMALL}"), prompts(3, 60), torch.ones(3, 60, dtype=torch.long)
    mask[0, :25] = mask[1, 37:] = 0
    got = model.generate(ids, attention_mask=mask, max_new_tokens=NEW)
    for row in range(3):
        alone = model.generate(ids[row : row + 1, mask[row].bool()], max_new_tokens=NEW)
        assert torch.equal(got[row, 60:], alone[0, -NEW:])


def test_caches_grow_and_are_used_again(compiled, monkeypatch) -> None:
    """Codes stay at their places when there is more room, and what an earlier call left does not matter."""
    from graphwright.runtime import generation

    model, ids = compiled("llama", f"quantize-cache:bits=2,{SMALL}"), prompts(2, 230)
    expected = model.generate(ids, max_new_tokens=26)
    assert torch.equal(model.generate(prompts(2, 30), max_new_tokens=5)[:, :30], prompts(2, 30))
    assert torch.equal(model.generate(ids, max_new_tokens=26), expected)
    monkeypatch.setattr(generation, "FIRST_ROOM", 1)
    model.generator.release()
    assert torch.equal(model.generate(ids, max_new_tokens=26), expected)


def test_drawn_tokens_follow_the_seed(compiled) -> None:
    """Sampling works as with exact caches."""
    model, ids = compiled("llama", f"quantize-cache:bits=2,{SMALL}"), prompts(2, 40)
    drawn = [model.generate(ids, max_new_tokens=8, do_sample=True, temperature=3.0, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_saved_model_generates_the_same(compiled, tmp_path) -> None:
    """States of every format, and what was decided, are in the file."""
    model, ids = compiled("llama", f"quantize-cache:bits=8+2,{SMALL}"), prompts(2, 50)
    model.save(tmp_path / "model.gw")
    loaded = graphwright.load(tmp_path / "model.gw")
    assert torch.equal(loaded.generate(ids, max_new_tokens=NEW), model.generate(ids, max_new_tokens=NEW))
    assert loaded.generator.cache_bytes == model.generator.cache_bytes
    (record,) = (record for record in loaded.report.decoding if record.pass_name == "quantize-cache")
    assert [decision.detail["bits"] for decision in record.plan.decisions] == [8, 2]
    assert parse_recipe(loaded.recipe).passes == (parse_pass(f"quantize-cache:bits=8+2,{SMALL}"),)


def test_a_prompt_longer_than_the_positions_is_refused(captured) -> None:
    """The room is that of the model's positions, whatever the format."""
    program = run_passes(captured("gpt2"), [*DEFAULT_PASSES, "cached-decode", f"quantize-cache:bits=4,{SMALL}", "dead-code"])
    assert KVCache(program.signature, 1, 256).capacity == 256
    with pytest.raises(InputError, match=r"room for 256 tokens .* asked for 300"):
        KVCache(program.signature, 1, 300)


def test_caches_need_a_generator(built, families) -> None:
    """The pass is asked for with generate=True, and the error says so."""
    with pytest.raises(OptionError, match=r"quantize-cache: the caches that it rewrites .* generate=True"):
        graphwright.compile(built("llama"), passes=["quantize-cache"], check=False, **families["llama"].sample(2, 9, 0))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma3", "phi3", "opt", "mixtral"])
def test_decoders_of_all_kinds(compiled, name) -> None:
    """With 8 bits all families' scores are near the exact ones; windows and norms of queries do not disturb it."""
    ids = prompts(2, 80)
    wanted, found = (scores(compiled(name, text), ids, 50) for text in ("", f"quantize-cache:bits=8,{SMALL}"))
    record = next(
        r for r in compiled(name, f"quantize-cache:bits=8,{SMALL}").report.decoding if r.pass_name == "quantize-cache"
    )
    assert record.plan.decisions
    assert float((found - wanted).norm() / wanted.norm()) < 5e-3


def test_the_command_line_shows_the_caches(built, tmp_path, capsys) -> None:
    """A model is compiled with a pass over its caches; that it ran, and the bytes, are shown."""
    built("llama").save_pretrained(tmp_path / "llama")
    path = tmp_path / "llama.gw"
    text = f"quantize-cache:bits=4,{SMALL}"
    argv = ["compile", str(tmp_path / "llama"), "-o", str(path), "--generate", "--pass", text, "--no-check", "--tokens", "9"]
    assert cli.main([*argv, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["cache"]["bytes_per_token"] == 56
    (row,) = (row for row in data["decoding"] if row["name"] == "quantize-cache")
    assert (row["options"], row["decisions"]) == (format_pass(parse_pass(text)), 2)
    assert cli.main([*argv[:4], "--pass", text]) != 0
    assert "--generate" in capsys.readouterr().err


@pytest.mark.slow
def test_a_trained_model_writes_the_same_text_from_eight_bits() -> None:
    """The language model of the checkout, 40 tokens behind 300; with 4 bits its loss on what follows is as good as the same."""
    from graphwright.tools import reference as trained

    model, ids = trained.load_language_model(), trained.held_out_ids(700).reshape(1, -1)
    exact, eight, four = (
        graphwright.compile(model, input_ids=ids[:, :64], check=False, generate=True, passes=passes)
        for passes in ([], ["quantize-cache:bits=8"], ["quantize-cache:bits=4"])
    )
    expected = exact.generate(ids[:, :300], max_new_tokens=40)
    assert torch.equal(eight.generate(ids[:, :300], max_new_tokens=40), expected)
    losses = [
        float(torch.nn.functional.cross_entropy(scores(compiled, ids, 300)[0, :-1], ids[0, 301:]))
        for compiled in (exact, eight, four)
    ]
    assert abs(losses[1] / losses[0] - 1) < 1e-3
    assert abs(losses[2] / losses[0] - 1) < 1e-2


def test_sparse_prompts_and_small_caches_compose(compiled, families, built) -> None:
    """Prompts see listed keys, tokens a cache of few bits: with all keys listed it is the cache alone."""
    ids = prompts(2, 200)
    sample = families["llama"].sample(2, 9, 0)
    cache = f"quantize-cache:bits=8,{SMALL}"

    def made(*passes: str):
        return graphwright.compile(built("llama"), passes=passes, check=False, generate=True, **sample)

    few, all_keys = (
        made("vertical-slash:vertical=30,slash=30,minimum_tokens=64", cache),
        made("vertical-slash:vertical=200,slash=200,minimum_tokens=64", cache),
    )
    wanted = scores(compiled("llama", cache), ids, 190)
    assert (scores(all_keys, ids, 190) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (scores(few, ids, 190) - wanted).abs().max() > 1e-4 * wanted.abs().max()
    answer = few.generate(ids[:, :190], max_new_tokens=4, eos_token_id=())
    assert answer.shape == (2, 194)
