"""A report in a real browser: on a phone, on a desk, on light and on dark paper."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from test_report import run  # noqa: F401 - a run folder as runs write it

from hpc_lbsgd.report import page

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
HARNESS = """<iframe id="phone" width="360" height="800" src="{page}"></iframe>
<iframe id="desk" width="1400" height="900" src="{page}"></iframe><pre id="found"></pre><script>
addEventListener("load", () => {{
  const found = {{}};
  for (const frame of document.querySelectorAll("iframe")) {{
    const view = frame.contentDocument, root = view.documentElement;
    found[frame.id] = {{
      overflow: root.scrollWidth - root.clientWidth,
      figures: [...view.querySelectorAll("figure svg")].map(s => s.getBoundingClientRect().width),
      columns: new Set([...view.querySelectorAll("figure")].map(f => f.getBoundingClientRect().left)).size,
      paper: getComputedStyle(view.body).backgroundColor,
      ink: getComputedStyle(view.querySelector("svg text")).fill,
      headings: [...view.querySelectorAll("h2")].map(h => h.textContent.trim()),
    }};
  }}
  document.getElementById("found").textContent = JSON.stringify(found);
}});</script>"""


def look(folder: Path, report: Path, dark: bool) -> dict:
    (folder / "harness.html").write_text(HARNESS.format(page=report.as_uri()))
    done = subprocess.run(
        [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
         f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
         "--dump-dom", (folder / "harness.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return json.loads(re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.S)[1])


def brightness(colour: str) -> float:
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3


@pytest.mark.skipif(BROWSER is None, reason="no chromium here: apt-get install chromium")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_page_fits_phone_and_desk_and_its_curves_take_the_paper_s_ink(run, tmp_path, dark):  # noqa: F811
    found = look(tmp_path, page.report([str(run.path)]), dark)
    for view in found.values():
        assert view["overflow"] <= 0 and len(view["figures"]) == 7 and min(view["figures"]) > 250
        assert (brightness(view["paper"]) < 60) is dark and (brightness(view["ink"]) > 180) is dark
        assert view["headings"][:3] == ["Runs", "Curves", "Where the time went"]
    assert found["phone"]["columns"] == 1 and found["desk"]["columns"] > 1
