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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

BLOCK = re.compile(r"(<!-- output of: (?P<command>[^\n]+?) -->\n).*?(<!-- end of output -->)", re.DOTALL)


def renewed(page: str, folder: Path = ROOT) -> str:
    """Return a page with the output of its commands as it is now.

    Args:
        page: the text.
        folder: where the commands run.

    Raises:
        subprocess.CalledProcessError: a command failed.
    """
    return BLOCK.sub(lambda found: f"{found[1]}```text\n{_output(found['command'], folder)}\n```\n{found[3]}", page)


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
        page = path.read_text("utf-8")
        if (new := renewed(page)) != page:
            path.write_text(new, "utf-8")
            print(f"renewed {path.relative_to(ROOT)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
