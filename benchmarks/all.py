"""All measurements on one page: python benchmarks/all.py gathers benchmarks/results/*.md into results/README.md.

With --reference, --nnssl and --pymic (checkouts to measure against) the speed and memory scripts run first.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = RESULTS / "README.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--reference", help="checkout of openmedlab/MIS-FM: run network_speed.py, with --pymic gradient_parity.py"
    )
    parser.add_argument(
        "--nnssl", help="checkout of MIC-DKFZ/nnssl: run fusion_speed.py and pretext_speed.py, with --pymic"
    )
    parser.add_argument("--pymic", help="checkout of HiLab-git/PyMIC")
    parser.add_argument("--run", action="store_true", help="run the scripts that need no checkout")
    options = parser.parse_args()
    if options.reference:
        run("network_speed.py", "--reference", options.reference)
    if options.reference and options.pymic:
        run("gradient_parity.py", "--reference", options.reference, "--pymic", options.pymic)
    if options.nnssl and options.pymic:
        for script in ("fusion_speed.py", "pretext_speed.py"):
            run(script, "--nnssl", options.nnssl, "--pymic", options.pymic)
    if options.run:
        scripts = ("memory_estimate", "class_shares", "pool_index", "pretraining_speed", "pretext_cost", "archive_cost")
        for script in scripts:
            run(f"{script}.py")
    pages = sorted(path for path in RESULTS.glob("*.md") if path != PAGE)
    text = "\n\n".join(
        re.sub("^#", "##", path.read_text(encoding="utf-8").strip(), flags=re.MULTILINE) for path in pages
    )
    head = "# Measurements\n\nGathered by `python benchmarks/all.py` from the files beside this one."
    PAGE.write_text(f"{head}\n\n{text}\n", encoding="utf-8")
    print(f"{PAGE}: {', '.join(path.name for path in pages)}")


def run(script: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(HERE / script), *arguments], check=True)


if __name__ == "__main__":
    main()
