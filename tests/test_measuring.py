"""Each pass measured: results, time, predictions."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.errors import InputError, OptionError
from graphwright.ir.printer import print_program
from graphwright.measuring import MOST_CALLS, SAMPLE_S, time_pairs
from graphwright.measuring_decode import measure_decoding
from graphwright.passes.base import Context
from graphwright.pipeline import replay, run_passes


class TinyLanguageModel(nn.Module):
    """A residual causal model with logits over its table, small enough to compile in a moment."""

    def __init__(self, causal=True):
        super().__init__()
        torch.manual_seed(0)
        self.causal = causal
        self.table = nn.Embedding(50, 16)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(16, 64) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(64, 16) for _ in range(2))
        self.head = nn.Linear(16, 50, bias=False)

    def forward(self, input_ids):
        x = self.table(input_ids)
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            h = norm(x)
            x = x + nn.functional.scaled_dot_product_attention(h[:, None], h[:, None], h[:, None], is_causal=self.causal)[:, 0]
            x = x + down(nn.functional.gelu(up(norm(x))))
        return self.head(x)


@pytest.fixture(scope="module")
def measured():
    """The model, measured with one of its two blocks left out."""
    ids = torch.randint(0, 50, (2, 12))
    calls = [{"input_ids": torch.randint(0, 50, (1, 20))} for _ in range(2)]
    passes = ["drop-layers:drop=1,unit=feed-forward,minimum_tokens=1"]
    return gw.measure(TinyLanguageModel(), ids, passes=passes, calibration=calls, repeat=3)


def test_each_pass_has_a_row(measured) -> None:
    """The rows are the capture and the passes that changed something; the last one is what was asked for."""
    names = [stage.name for stage in measured.stages]
    assert names[0] == "capture"
    assert names[-1].startswith("drop-layers")
    assert "raise-attention" in names
    assert "raise-rotary" not in names
    assert measured.calls == 2


def test_quality_tells_exact_from_lossy(measured) -> None:
    """Recognition changes nothing but rounding; a block left out changes what the model says."""
    *exact, lossy = measured.stages
    assert all(stage.quality.relative_error < 1e-4 and stage.quality.top1_agreement == 1 for stage in exact)
    assert all(abs(stage.quality.nll_change) < 1e-4 for stage in exact)
    assert lossy.quality.relative_error > 1e-3
    assert lossy.quality.kl > 1e-6
    assert lossy.quality.tokens == 40


def test_costs_fall_with_what_is_left_out(measured) -> None:
    """Flops, weights and the predicted time of the last pass are below those before; savings are ratios of the time before."""
    before, after = measured.stages[-2:]
    assert after.predicted.flops < before.predicted.flops
    assert after.predicted.weight_bytes < before.predicted.weight_bytes
    at = len(measured.stages) - 1
    assert measured.saved_predicted(at) == pytest.approx(1 - after.predicted.time_us / before.predicted.time_us)
    assert 0 < measured.saved_predicted(at) < 1
    assert measured.saved(at) == pytest.approx(1 - before.ratio / after.ratio)
    assert measured.saved(0) is measured.saved_predicted(0) is None
    assert all(stage.time_us > 0 and stage.original_us > 0 for stage in measured.stages)


def test_a_model_that_sees_later_tokens_has_no_next_token() -> None:
    """Without causality there is a divergence and an agreement, but no likelihood of the next token."""
    found = gw.measure(TinyLanguageModel(causal=False), torch.randint(0, 50, (2, 12)), repeat=1)
    assert found.stages[0].quality.kl is not None
    assert found.stages[0].quality.nll_change is None
    assert found.calls == 1


def test_replay_does_what_was_done(captured) -> None:
    """The recorded plans, carried out again, give the same programs; records that changed nothing give none."""
    program = captured("llama")
    result = run_passes(program, context=Context(), keep_text=True)
    again = list(replay(program, result.records))
    assert [record.text for record, _ in again] == [print_program(stage) for _, stage in again]
    assert print_program(again[-1][1]) == print_program(result)
    assert len(again) == sum(1 for record in result.records if record.plan.decisions)


def test_wrong_options() -> None:
    """No runs at all, and passes on caches, are refused by name."""
    model, ids = TinyLanguageModel(), torch.randint(0, 50, (2, 12))
    with pytest.raises(OptionError, match="repeat must be at least 1, got 0"):
        gw.measure(model, ids, repeat=0, check=False)
    with pytest.raises(OptionError, match="quantize-cache: the caches that it rewrites are there only"):
        gw.measure(model, ids, passes=["quantize-cache"], check=False)


def test_passes_on_caches(captured) -> None:
    """A format of the cache has a row: fewer bytes, a small error, and what a token takes behind others."""
    program = captured("llama")
    plain = run_passes(program)
    passes = ["cached-decode", "quantize-cache:bits=8,group_size=16,residual=0", "dead-code"]
    decoding = run_passes(plain, passes).records[len(plain.records) :]
    texts = [torch.randint(3, 60, (length,)) for length in (120, 90, 3)]
    found = measure_decoding(program, plain.records, decoding, texts, repeat=1, tell=lambda text: None)
    exact, quantised = found.stages
    assert (exact.name, quantised.name) == ("cached-decode", passes[1])
    assert exact.quality.relative_error == 0
    assert 0 < quantised.quality.relative_error < 0.1
    assert quantised.quality.tokens == 60 + 45
    assert quantised.quality.nll_change is not None
    assert quantised.predicted.state_bytes < exact.predicted.state_bytes
    assert quantised.time_us > 0
    assert found.calls == 2


def test_caches_need_a_text(captured) -> None:
    """A sample without a few tokens in a row is refused, with what is wanted."""
    with pytest.raises(InputError, match="texts of at least 4 tokens, and none of 1 has so many"):
        measure_decoding(captured("llama"), (), (), [torch.ones(3, dtype=torch.int64)], repeat=1, tell=lambda text: None)


def test_pairs_take_turns() -> None:
    """Each goes first in turn, after two runs of both that do not count; what is short is called often."""
    order = []

    def long(name: str) -> None:
        order.append(name)
        start = time.thread_time()
        while time.thread_time() - start < 1.5 * SAMPLE_S:
            pass

    pairs = time_pairs(lambda: long("a"), lambda: long("b"), 3)
    assert "".join(order) == "aabb" + "ab" + "ba" + "ab"
    assert all(seconds >= 1.5 * SAMPLE_S for pair in pairs for seconds in pair)
    short = []
    time_pairs(lambda: short.append(1), lambda: None, 1)
    assert len(short) == 2 + MOST_CALLS
