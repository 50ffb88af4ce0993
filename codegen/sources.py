"""The sources of a schedule's kernels: equal ones are kept once, whichever layer they were written for."""

from __future__ import annotations

IMPORTS = "import triton\nimport triton.language as tl\n"
LIBDEVICE = "from triton.language.extra import libdevice\n"
LONGEST_NAME = 60
SHOWN = 4
"""This many places that a kernel is used for are named in its header."""


class KernelSources:
    """Gathers kernels, and writes a module for each."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._uses: dict[str, list[str]] = {}
        self._modules: dict[str, str] = {}

    def add(self, stem: str, body: str, provenance: str) -> str:
        """Return the name of a kernel, which is a new one if no kernel has this body.

        Args:
            stem: what the kernel does, for its name.
            body: the functions' source, with "{name}" where the kernel's name stands.
            provenance: what it computes here.
        """
        name = self._names.get(body)
        if name is None:
            base = stem[:LONGEST_NAME].strip("_") + "_kernel"
            taken = sum(1 for other in self._names.values() if other.rpartition("_")[0] == base or other == base)
            name = f"{base}_{taken}" if taken else base
            self._names[body] = name
            self._uses[name] = []
        self._uses[name].append(provenance)
        return name

    def texts(self) -> dict[str, str]:
        """Return the module of each kernel by the kernel's name."""
        return {name: self._module(name, body) for body, name in self._names.items()}

    def _module(self, name: str, body: str) -> str:
        uses = self._uses[name]
        header = [f"# {use}" for use in uses[:SHOWN]]
        if len(uses) > SHOWN:
            header.append(f"# and {len(uses) - SHOWN} more like these")
        imports = IMPORTS + (LIBDEVICE if "libdevice." in body else "")
        return "\n".join(header) + f"\n\n{imports}\n\n{body.replace('{name}', name)}"
