"""``python -m attnlib_site --out build/docs``: write what the generator builds."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from .write import write


def main() -> None:
    """Write the pages and say how many."""
    parser = argparse.ArgumentParser(prog="attnlib_site", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for pages and settings, made anew")
    out = parser.parse_args().out
    torch.set_num_threads(1)  # the tensors are tiny: waiting for a second thread costs more than it brings
    start = time.perf_counter()
    pages = write(out)
    sys.stdout.write(f"{len(pages)} pages in {time.perf_counter() - start:.1f} s: {out}\n")


if __name__ == "__main__":
    main()
