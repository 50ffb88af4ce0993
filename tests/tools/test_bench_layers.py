"""The table of what leaving out layers costs."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from graphwright.tools.bench.layers import layers


@pytest.mark.slow
def test_the_tables_have_a_row_for_each_way() -> None:
    """Each unit is scored in four ways, and what is left is compiled and timed."""
    options = ["--unit", "attention", "--drop", "1", "--calibration", "1", "--held-out", "1", "--time"]
    result = CliRunner().invoke(layers, options, catch_exceptions=False)
    assert result.exit_code == 0
    assert result.output.count("influence") == result.output.count("leave-one-out") == 2
    assert "nats per token" in result.output
    assert "15.0 MiB" in result.output
