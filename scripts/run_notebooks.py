"""Run the notebooks as a reader would, and keep them with what they printed and drew.

    pip install ".[notebooks]"
    python scripts/run_notebooks.py -o demo/notebooks

Each runs in a Jupyter kernel of its own, in a folder that is empty at first and gone after. The .ipynb files that come
of it open in Jupyter, in an editor or on a page that shows notebooks.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
LONGEST = 1800  # seconds that a cell may take on a machine that is busy


def run(source: Path) -> nbformat.NotebookNode:
    """A notebook in the percent format with the outputs of all its cells; CellExecutionError where one fails."""
    notebook = jupytext.read(source)
    with tempfile.TemporaryDirectory() as folder:
        place = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=LONGEST, resources=place, coalesce_streams=True).execute()
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="files (default: all that there are)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the .ipynb files")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for source in args.notebooks or sorted(NOTEBOOKS.glob("*.py")):
        start = time.perf_counter()
        target = args.output / f"{source.stem}.ipynb"
        nbformat.write(run(source), target)
        print(f"{target} ({time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
