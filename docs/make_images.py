"""Make the pictures of the README from out/demo-smollm2: `make images` (after `make demo-smollm2`; needs Debian's chromium).

The page's screenshot in docs/images/page.png, one figure in docs/images/norm_diff.png.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from analysis.draw import write_png
from analysis.grids import build_stack
from analysis.html_page import write_page
from analysis.metrics import find_metric
from analysis.run import open_run
from analysis.select import Filters

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
VIEW = "show=BB-SS&metric=kl_divergence&log=1&cell=20.7&theme=light"


def shrink(file: Path) -> None:
    """To 256 colours: less than half of the bytes."""
    Image.open(file).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
        file, optimize=True
    )
    print(f"{file.relative_to(ROOT)}: {file.stat().st_size / 1e3:.0f} kB")


def main() -> None:
    out, chromium = ROOT / "out/demo-smollm2", shutil.which("chromium")
    if not out.is_dir():
        sys.exit("there is no out/demo-smollm2: run make demo-smollm2")
    if chromium is None:
        sys.exit("the screenshot needs a browser: apt install chromium")
    con = open_run(str(out))
    IMAGES.mkdir(exist_ok=True)
    write_png(
        build_stack(con, find_metric("pairwise", "norm_diff"), Filters(prompt=0)), IMAGES / "norm_diff.png", log=True
    )
    with tempfile.TemporaryDirectory() as folder:
        page = write_page(con, Path(folder) / "page.html").path
        subprocess.run(
            [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1.25",
             "--window-size=1280,1130", "--virtual-time-budget=8000", f"--screenshot={IMAGES / 'page.png'}",
             f"--user-data-dir={folder}/profile", f"file://{page}#{VIEW}"],
            check=True, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    for name in ("page.png", "norm_diff.png"):
        shrink(IMAGES / name)


if __name__ == "__main__":
    main()
