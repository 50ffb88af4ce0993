"""docs/writing-a-pass.md: it shows the example whole, its session prints what it says, and the example is a good pass."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import graphwright
from graphwright.ir.errors import OptionError, PassError
from graphwright.ir.ops import definition
from graphwright.passes.base import Context
from graphwright.passes.registry import format_pass, parse_pass
from graphwright.pipeline import run_passes
from graphwright.tools.cli import cli

UPDATE = "GRAPHWRIGHT_UPDATE_GOLDEN"


@pytest.fixture(scope="module")
def examples(root: Path) -> Iterator[Path]:
    """The folder of examples, from which modules can be imported."""
    folder = root / "docs" / "examples"
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def example(examples: Path) -> ModuleType:
    """The example's module."""
    import skip_inactive

    return skip_inactive


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    """The page."""
    return (root / "docs" / "writing-a-pass.md").read_text()


@pytest.fixture(scope="module")
def program(examples: Path) -> Any:
    """The block of the examples, after what is done to every model."""
    from block import block

    model, sample = block()
    return run_passes(graphwright.capture(model, **sample))


def loosely(text: str) -> list[str]:
    """Return the lines of an output with numbers to two digits, since the last ones depend on the CPU."""
    return [re.sub(r"\d+\.\d+(e[+-]\d+)?", lambda m: f"{float(m[0]):.1g}", line.rstrip()) for line in text.strip().splitlines()]


def test_the_page_shows_the_example_whole(page: str, examples: Path) -> None:
    """The parts of the page are the file, in order and without a gap."""
    parts = re.findall(r"^```python skip_inactive.py\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert len(parts) > 3
    shown = [line for part in parts for line in part.splitlines() if line]
    assert shown == [line for line in (examples / "skip_inactive.py").read_text().splitlines() if line]


def test_the_session_prints_what_the_page_says(
    page: str, example: ModuleType, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks run one after the other, and each is followed by what it prints; no text if that is nothing."""
    found = re.findall(r"^```(python|sh) session\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?", page, re.DOTALL | re.MULTILINE)
    assert page.count("```python") + page.count("```sh") == len(found) + page.count("```python skip_inactive.py")
    names: dict[str, Any] = {"__name__": "session"}
    torch.manual_seed(1)
    monkeypatch.chdir(tmp_path)
    for language, block, expected in found:
        printed = run_python(block, names) if language == "python" else run_command(block)
        if os.environ.get(UPDATE):
            page = page.replace(f"{block}```\n\n```text\n{expected}", f"{block}```\n\n```text\n{printed.rstrip()}\n")
            (root / "docs" / "writing-a-pass.md").write_text(page)
        else:
            assert loosely(printed) == loosely(expected)


def run_python(block: str, names: dict[str, Any]) -> str:
    """Return what a block prints; it sees the names of those before."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, "session", "exec"), names)
    return printed.getvalue()


def run_command(block: str) -> str:
    """Return what a graphwright command prints."""
    program, *arguments = shlex.split(block)
    assert program == "graphwright"
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("tokens", [1, 7])
def test_the_kernel_computes_what_the_reference_does(example: ModuleType, tokens: int) -> None:
    """At awkward sizes, with NaN and infinities in x: for one token by the kernel, for more by PyTorch."""

    class Product(torch.nn.Module):
        def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return example.skipping_linear(x, weight, 0.7)

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(63, 1000, generator=generator)
    made = graphwright.compile(Product(), torch.randn(2, tokens, 63), weight, dynamic={"x": {0: "batch"}})
    assert bool(made.kernels) == (tokens == 1)
    for batch, poison in ((1, None), (3, None), (2, torch.nan), (2, torch.inf)):
        x = torch.randn(batch, tokens, 63, generator=generator)
        x[0, 0, 5], x[0, 0, 6] = 0.7, -0.7
        if poison is not None:
            x[-1, 0, 3] = poison
        expected = example.reference(x, weight, 0.7)
        torch.testing.assert_close(made(x, weight), expected, rtol=1e-5, atol=1e-4, equal_nan=True)


def test_an_operation_of_another_package_has_a_cost(example: ModuleType, builder: Any) -> None:
    """The cost analysis finds the formula of an operation that was defined after it."""
    from graphwright.ir.analyses.cost import cost_of_node

    assert definition.find_operation(example.skipping_linear) is not None
    build = builder()
    x = build.input("x", 5, 1, 63)
    node = build.call(example.skipping_linear, x, build.weight("w", torch.randn(63, 1000)), 0.7)
    assert cost_of_node(build.program(node), node).flops == 2 * 5 * 63 * 1000


def test_decoding_with_caches_takes_it(examples: Path, example: ModuleType, families: dict[str, Any], built: Any) -> None:
    """A model that generates computes each token as the plain program does."""
    family = families["llama"]
    calls = [family.sample(2, 16, seed) for seed in (1, 2)]
    step = example.SkipInactive(ratio=0.5)
    made = graphwright.compile(built("llama"), **calls[0], passes=[step], calibration=calls, generate=True)
    ids = family.sample(2, 9, 3)["input_ids"]
    tokens = made.generate(ids, max_new_tokens=4)
    for _ in range(4):
        ids = torch.cat([ids, made(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(tokens, ids)


def test_it_refuses(example: ModuleType, program: Any, captured: Any) -> None:
    """What does not fit has a reason; options and calls that are missing are errors."""
    step = example.SkipInactive()
    assert "no gated feed-forward" in step.plan(captured("convnet"), Context()).refusals[0].reason
    with pytest.raises(PassError, match="sample calls"):
        step.plan(program, Context())
    with pytest.raises(OptionError, match="ratio must be"):
        example.SkipInactive(ratio=1.0)
    assert example.SkipInactive(ratio=0.0).plan(program, Context()).decisions == ()


def test_it_can_be_registered(example: ModuleType, monkeypatch: pytest.MonkeyPatch, page: str) -> None:
    """The entry point of the page gives the pass its name on the command line."""
    import importlib.metadata
    import tomllib

    (text,) = re.findall(r"^```toml\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    ((name, value),) = tomllib.loads(text)["project"]["entry-points"]["graphwright.passes"].items()
    entry = importlib.metadata.EntryPoint(name, value, "graphwright.passes")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry] if group == "graphwright.passes" else [])
    step = parse_pass("skip-inactive:ratio=0.25")
    assert step == example.SkipInactive(ratio=0.25)
    assert format_pass(step) == "skip-inactive:ratio=0.25"


@pytest.mark.slow
def test_the_measurement_runs(examples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table has a row for each ratio, and the loss rises with it."""
    import measure_skipping

    measure_skipping.main((0.0, 0.5), 64, 128)
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split()[1] for row in rows] == ["0%", "50%"]
    assert [float(row.split()[3]) > 0.001 for row in rows] == [False, True]
