"""Run the commands whose output the documentation shows, and put their output in.

    python tools/dev/readme.py [PAGE ...]

In a page such a block stands between two comments, the first of which holds the command, run in the top folder:

    <!-- output of: graphwright doctor -->
    ...
    <!-- end of output -->
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

BLOCK = re.compile(r"(<!-- output of: (?P<command>[^\n]+?) -->\n).*?(<!-- end of output -->)", re.DOTALL)


def renew(path: Path, folder: Path = ROOT) -> bool:
    """Put the output of a page's commands, as it is now, into it, and return whether that changed the page.

    Args:
        path: of the page.
        folder: where the commands run.

    Raises:
        subprocess.CalledProcessError: a command failed; the page is as it was.
    """
    outputs = {found["command"]: _output(found["command"], folder) for found in BLOCK.finditer(path.read_text("utf-8"))}
    # The commands may take minutes, in which the page may have been edited.
    page = path.read_text("utf-8")
    new = BLOCK.sub(lambda found: _filled(found, outputs), page)
    path.write_text(new, "utf-8")
    return new != page


def _filled(found: re.Match[str], outputs: Mapping[str, str]) -> str:
    output = outputs.get(found["command"])
    return found[0] if output is None else f"{found[1]}```text\n{output}\n```\n{found[3]}"


def _output(command: str, folder: Path) -> str:
    print(command, file=sys.stderr, flush=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return "\n".join(line.rstrip() for line in done.stdout.strip("\n").splitlines())


def main() -> int:
    """Renew the pages that the command line names, or all, and return 0."""
    named = [Path(name).resolve() for name in sys.argv[1:]]
    for path in named or [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        if renew(path):
            print(f"renewed {path.relative_to(ROOT)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
