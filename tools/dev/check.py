"""Run every check of the project: link tree, ruff, mypy, pytest.

    python tools/dev/check.py [--lint | --all]

All steps run even when an earlier one fails, pytest last. Exit status 1 if any failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import link_tree

LINT = {
    "ruff check": ["ruff", "check", "."],
    "ruff format": ["ruff", "format", "--check", "."],
    "mypy": ["mypy"],
}


def main() -> int:
    """Run the steps that the command line asks for and return the exit status."""
    parser = argparse.ArgumentParser(description="Run every check of the project.")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--lint", action="store_true", help="run ruff and mypy only")
    only.add_argument("--all", action="store_true", help="run the tests marked slow as well")
    parser.add_argument("-n", "--workers", default="2", help="pytest processes (default: %(default)s)")
    options = parser.parse_args()

    steps = dict(LINT)
    if not options.lint:
        selection = [] if options.all else ["-m", "not slow"]
        steps["pytest"] = ["pytest", "-n", options.workers, *selection]

    link_tree.main()
    failed = []
    for name, command in steps.items():
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, "-m", *command], cwd=link_tree.ROOT, check=False).returncode != 0:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
