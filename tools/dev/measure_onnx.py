"""Measure what docs/exporting.md says of exported models: `python tools/dev/measure_onnx.py [minilm|windows|decoding]...`."""

from __future__ import annotations

import functools
import importlib
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

import graphwright
from graphwright.exporting_onnx import EXPORT_PASSES
from graphwright.ir.program import Dimension
from graphwright.pipeline import run_passes
from graphwright.tools.reference import held_out_ids, load_language_model, load_minilm

RUNS = 9


class Window(nn.Module):
    """Causal attention over a window of keys."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return [batch, heads, tokens, features] of tensors of that shape."""
        rows = torch.arange(q.shape[2])
        back = rows[:, None] - rows
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=(back >= 0) & (back < self.window))


def session(path: Path) -> Any:
    """Return a file as onnxruntime runs it on one thread."""
    onnxruntime: Any = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def show(what: str, ways: Mapping[str, Callable[[], object]]) -> None:
    """Print the median time of each way, measured in turn."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(RUNS):
        for name, run in ways.items():
            started = time.thread_time()
            run()
            times[name].append(time.thread_time() - started)
    print(f"{what}: {', '.join(f'{name} {median(found) * 1e3:.2f} ms' for name, found in times.items())}", flush=True)


def minilm(folder: Path) -> None:
    """Compare our file with PyTorch's and with eager."""
    model = load_minilm().eval()
    ids = torch.randint(1000, 3000, (8, 128))
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    graphwright.export_onnx(model, folder / "ours.onnx", **given, check=False)
    size = torch.export.Dim.DYNAMIC
    shapes = {name: {0: size, 1: size} for name in given}
    exporter: Any = torch.onnx.export
    exporter(model, (), folder / "torch.onnx", kwargs=given, dynamo=True, dynamic_shapes=shapes, verbose=False)
    sessions = {name: session(folder / f"{name}.onnx") for name in ("ours", "torch")}
    for batch, tokens in ((1, 16), (1, 128), (8, 128)):
        part = {name: tensor[:batch, :tokens] for name, tensor in given.items()}
        feeds = {name: tensor.numpy() for name, tensor in part.items()}
        ways = {name: functools.partial(opened.run, None, feeds) for name, opened in sessions.items()}
        show(f"MiniLM {batch} x {tokens}", {**ways, "eager": functools.partial(model, **part)})


def windows(folder: Path) -> None:
    """Compare blocks with a mask over all keys."""
    for window in (64, 256):
        sample = torch.randn(1, 8, 40, 64)
        names = {name: {0: "batch", 2: "tokens"} for name in "qkv"}
        program = graphwright.capture(Window(window), sample, sample, sample, dynamic=names)

        program = run_passes(program, EXPORT_PASSES)
        graphwright.export_onnx(program, folder / "blocks.onnx", check=False)
        # As long as sequences cannot be longer than that, blocks are not worth it.
        program.dimensions["tokens"] = Dimension("tokens", 1, 2 * window)
        graphwright.export_onnx(program, folder / "full.onnx", check=False)
        sessions = {name: session(folder / f"{name}.onnx") for name in ("full", "blocks")}
        for tokens in (window, 4 * window, 1024, 4096):
            feeds = {name: np.random.randn(1, 8, tokens, 64).astype(np.float32) for name in "qkv"}
            ways = {name: functools.partial(opened.run, None, feeds) for name, opened in sessions.items()}
            show(f"window {window}, {tokens} tokens", ways)


def decoding(folder: Path) -> None:
    """Compare caches of 32, 8 and 4 bits: what they change, and the time of a step and of a prompt."""
    model = load_language_model().eval()
    ids = held_out_ids(4000).reshape(1, -1)
    calibration = [{"input_ids": ids[:, start : start + 256]} for start in range(1000, 2024, 256)]
    sessions = {}
    for name, passes in (("float32", []), ("int8", ["quantize-cache:bits=8"]), ("int4", ["quantize-cache:bits=4"])):
        report = graphwright.export_onnx(
            model,
            folder / f"{name}.onnx",
            input_ids=ids[:, :33],
            generate=True,
            passes=passes,
            calibration=calibration if passes else [],
        )
        sessions[name] = session(folder / f"{name}.onnx")
        print(name, *(note for note in report.notes if "kept in" in note), flush=True)
    for past, tokens in ((128, 1), (512, 1), (2048, 1), (0, 512)):
        ways = {}
        for name, opened in sessions.items():
            given = [value for value in opened.get_inputs() if value.name.startswith("past")]
            dtypes = {"tensor(float)": np.float32, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8}
            feeds: dict[str, Any] = {v.name: np.ones((1, v.shape[1], past, v.shape[3]), dtypes[v.type]) for v in given}
            feeds["input_ids"] = ids[:, :tokens].numpy()
            feeds["attention_mask"] = np.ones((1, past + tokens), np.int64)
            ways[name] = functools.partial(opened.run, None, feeds)
        show(f"{tokens} tokens after {past}", ways)


if __name__ == "__main__":
    torch.set_num_threads(1)
    parts = {"minilm": minilm, "windows": windows, "decoding": decoding}
    with tempfile.TemporaryDirectory() as made, torch.no_grad():
        for part in sys.argv[1:] or parts:
            parts[part](Path(made))
