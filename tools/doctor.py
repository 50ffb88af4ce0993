"""`graphwright doctor`: what Graphwright found on this machine, and what is missing."""

from __future__ import annotations

import dataclasses
import importlib
import json
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import graphwright

if TYPE_CHECKING:
    from rich.table import Table

PACKAGES = ("torch", "triton", "llvmlite", "numpy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What was found.

    Args:
        graphwright: Graphwright's version.
        python: Python's version.
        packages: package -> version, None where it is missing.
        cpu: the processor's name.
        isa: the instruction set that kernels are compiled for, "" where it could not be chosen.
        vector_bits: width of that instruction set's vector registers; 0 where it could not be chosen.
        isa_features: what else of the instruction set is used.
        threads: number of threads that a kernel runs on; 0 without torch.
        backend_registered: whether Triton found the `cpu` backend and could load it.
        problems: what keeps Graphwright from working, with the remedy where there is one.
        machine: what the CPU was measured to do with these threads, which predictions rest on: the fields of
            `graphwright.ir.target.Target`; None where it could not be measured.
    """

    graphwright: str
    python: str
    packages: dict[str, str | None]
    cpu: str
    isa: str
    vector_bits: int
    isa_features: list[str]
    threads: int
    backend_registered: bool
    problems: list[str]
    machine: dict[str, Any] | None = None


def cpu_name() -> str:
    """Return the processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def diagnose() -> Diagnosis:
    """Look at this machine."""
    problems = []
    packages: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
            importlib.import_module(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
            problems.append(f"{name} is not installed: pip install {name}")
        # A broken native library raises OSError, a broken Triton backend whatever it likes.
        except Exception as error:  # noqa: BLE001
            problems.append(f"import {name}: {type(error).__name__}: {error}")

    isa, vector_bits, features = "", 0, list[str]()
    try:
        from graphwright.runtime.triton_cpu.isa import host_isa

        found = host_isa()
        isa, vector_bits, features = found.name, found.vector_bits, sorted(found.has)
    except (ImportError, RuntimeError) as error:
        problems.append(f"instruction set: {error}")

    # Only what was imported without an error is here.
    torch, backends = sys.modules.get("torch"), sys.modules.get("triton.backends")
    registered = "cpu" in getattr(backends, "backends", {})
    if backends is not None and not registered:
        problems.append("Triton does not know the backend 'cpu': reinstall graphwright, and unset TRITON_BACKENDS_IN_TREE")
    machine = None
    if torch is not None and not problems:
        from graphwright.runtime.machine import this_machine

        machine = dataclasses.asdict(this_machine())
    return Diagnosis(
        graphwright=graphwright.__version__,
        python=platform.python_version(),
        packages=packages,
        cpu=cpu_name(),
        isa=isa,
        vector_bits=vector_bits,
        isa_features=features,
        threads=torch.get_num_threads() if torch else 0,
        backend_registered=registered,
        problems=problems,
        machine=machine,
    )


def to_table(diagnosis: Diagnosis) -> Table:
    """Return the diagnosis as a table of two columns, without the problems."""
    from rich.table import Table

    table = Table(show_header=False)
    table.add_row("graphwright", diagnosis.graphwright)
    table.add_row("python", diagnosis.python)
    for name, version in diagnosis.packages.items():
        table.add_row(name, version or "missing")
    table.add_row("CPU", diagnosis.cpu)
    isa = f"{diagnosis.isa} ({diagnosis.vector_bits} bits)" if diagnosis.isa else "none"
    table.add_row("instruction set", ", ".join([isa, *diagnosis.isa_features]))
    table.add_row("threads", str(diagnosis.threads))
    table.add_row("Triton backend 'cpu'", "registered" if diagnosis.backend_registered else "not registered")
    if diagnosis.machine is not None:
        found = diagnosis.machine
        table.add_row("products", f"{found['flops_per_second'] / 1e9:.3g} GFLOP/s")
        table.add_row("memory", f"{found['bytes_per_second'] / 1e9:.3g} GB/s")
        table.add_row("caches", f"{found['cache_bytes_per_second'] / 1e9:.3g} GB/s, {found['cache_bytes'] >> 10} KiB")
    return table


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.pass_context
def doctor(context: click.Context, as_json: bool) -> None:
    """Show what Graphwright found on this machine.

    Exits with 1 if anything keeps it from working.
    """
    from rich.console import Console
    from rich.markup import escape

    diagnosis = diagnose()
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(diagnosis), indent=2))
    else:
        console = Console()
        console.print(to_table(diagnosis))
        for problem in diagnosis.problems:
            console.print(f"[red]problem:[/red] {escape(problem)}")
    context.exit(1 if diagnosis.problems else 0)
