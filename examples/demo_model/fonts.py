"""The fonts of the demo's texts: what training drew with, and what was kept back to measure with.

    pip install --no-deps --target fonts font-caladea==0.0.2 font-fjallaone==0.1.7 font-fredoka-one==0.0.4 \
        font-intuitive==0.0.4 font-lato==0.1.0 font-manrope==0.0.2 font-rhd==0.1.3 font-source-sans-pro==0.0.1 \
        font-source-serif-pro==0.0.1 font-roboto==0.0.1 matplotlib
    python -m examples.demo_model.fonts --out FONTS fonts /usr/share/fonts

copies them to FONTS/learnt and FONTS/held. DejaVu is that of Debian's fonts-dejavu, STIX that of matplotlib; all are
free. Which files there are, and their order, decides what a seed draws.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

LEARNT = """Caladea-Bold Caladea-Italic Caladea-Regular DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique
DejaVuSansCondensed DejaVuSansMono DejaVuSansMono-Bold DejaVuSerif DejaVuSerif-Bold DejaVuSerifCondensed-Italic
FjallaOne-Regular FredokaOne-Regular Intuitive Lato-Black Lato-Bold Lato-BoldItalic Lato-Italic Lato-Light Lato-Regular
Manrope-Bold Manrope-Light Manrope-Regular RedHatDisplay-Black RedHatDisplay-Italic RedHatDisplay-Medium
RedHatDisplay-Regular SourceSansPro-Black SourceSansPro-Bold SourceSansPro-It SourceSansPro-Light SourceSansPro-Regular
SourceSansPro-SemiboldIt"""
HELD = """Roboto-Black Roboto-Bold Roboto-Italic Roboto-Light Roboto-Regular STIXGeneral STIXGeneralBol
STIXGeneralItalic SourceSerifPro-Black SourceSerifPro-Bold SourceSerifPro-It SourceSerifPro-Light
SourceSerifPro-Regular"""


def gather(roots: list[Path], out: Path) -> list[str]:
    """Copy the files, the first of each name found under `roots`; returns the names that are nowhere."""
    found = {path.name: path for root in reversed(roots) for path in sorted(root.rglob("*.ttf"), reverse=True)}
    missing = []
    for folder, names in (("learnt", LEARNT), ("held", HELD)):
        (out / folder).mkdir(parents=True, exist_ok=True)
        for name in names.split():
            if f"{name}.ttf" in found:
                shutil.copyfile(found[f"{name}.ttf"], out / folder / f"{name}.ttf")
            else:
                missing.append(name)
    return missing


def main() -> None:
    """Gather them."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("roots", type=Path, nargs="+", help="folders to search")
    options.add_argument("--out", type=Path, required=True)
    chosen = options.parse_args()
    if missing := gather(chosen.roots, chosen.out):
        sys.exit(f"not found: {', '.join(missing)}")


if __name__ == "__main__":
    main()
