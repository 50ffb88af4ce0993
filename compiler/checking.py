"""Comparing a program with its model at other sizes than the sample's."""

from __future__ import annotations

from typing import Any


def check_program(*args: Any) -> None:
    """Nothing yet."""
