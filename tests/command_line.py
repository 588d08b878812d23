"""The command line in this process and in one of its own."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

from medseg3d import cli

ROOT = Path(__file__).resolve().parents[1]


def run_here(capsys, *arguments):
    """(exit code, lines on stdout, lines on stderr); logging stays as it was, though a bundle may set its own."""
    root, logger = logging.getLogger(), logging.getLogger("medseg3d")
    before = root.handlers[:], root.level, logger.level
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse
        code = stop.code
    finally:
        root.handlers[:] = before[0]
        root.setLevel(before[1])
        logger.setLevel(before[2])
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err.splitlines()


def started(*arguments, code="from medseg3d.cli import main\nsys.exit(main())", prefix=(), env=(), **options):
    """A process of its own that runs the command line, or other `code`, with more environment variables."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | dict(env)
    command = [*prefix, sys.executable, "-c", f"import sys\n{code}", *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def finished(process, timeout=300):
    """(exit code, lines on stdout, lines on stderr) of a process at its end."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out.splitlines(), err.splitlines()


def names(folder):
    """The names of all files in a folder, at any depth."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file())
