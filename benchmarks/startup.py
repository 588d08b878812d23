"""Start and end of a process: seconds that PyTorch, MONAI and medseg3d take before and after any work.

    python benchmarks/startup.py [--rounds 5]

Each row is a process that imports something and ends; processes take turns, medians are printed. "in turn" is what
`medseg3d predict` imports as any program would, "predict" the same as the command does it (medseg3d/startup.py), with a
bundle that is configs alone and with one that has scripts.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from statistics import median

from whole_scan import Taken, process

NEEDED = "import medseg3d.bundle, medseg3d.several"
QUICK = "from medseg3d.startup import quick_imports\nwith quick_imports({engines}): " + NEEDED
PROCESSES = {
    "python": "",
    "torch": "import torch",
    "monai": "import monai",
    "medseg3d, in turn": NEEDED,
    "medseg3d predict, configs": QUICK.format(engines=False),
    "medseg3d predict, scripts": QUICK.format(engines=True),
    "medseg3d models": "from medseg3d import cli\ncli.main(['models'])",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    taken: dict[str, list[Taken]] = {name: [] for name in PROCESSES}
    print(f"Python {sys.version.split()[0]}, {args.rounds} rounds, load {os.getloadavg()[0]:.1f}\n")
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            for name, code in PROCESSES.items():
                taken[name].append(process([sys.executable, "-c", code], 1, Path(folder, "log.txt")))
    print("| imports | s | CPU s |\n|---|---|---|")
    for name, rounds in taken.items():
        wall, cpu = (median(getattr(one, field) for one in rounds) for field in ("wall", "cpu"))
        print(f"| {name} | {wall:.2f} | {cpu:.2f} |")


if __name__ == "__main__":
    main()
