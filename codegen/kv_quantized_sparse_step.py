"""The steps of attention where prompts see listed keys and what follows them a quantised cache."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from graphwright.ir import dialect
from graphwright.ir.program import Program
from graphwright.runtime.schedule import KernelStep

from . import kv_quantized_step, sparse_step
from .attention_step import result_strides
from .sources import KernelSources
from .steps import Place, StepMaker


def _steps(program: Program, node: fx.Node, place: Place, sources: KernelSources, device: str) -> Sequence[KernelStep]:
    """Return the steps of sequences that go on, and of those that start: each leaves the other's results alone."""
    later = kv_quantized_step.attention_step(program, node, place, sources, device, continued=True)
    return (later, *sparse_step.attention_steps(program, node, place, sources, device, fresh=True))


MAKERS = {
    dialect.kv_quantized_sparse_attention: StepMaker(make=_steps, accepts=sparse_step.accepts, strides=result_strides),
}
"""Operation -> what makes its steps."""
