"""The report: what stands in it, and how it looks at the width of a desk and of a telephone."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import v4surgery
from tests.validation.masked_support import Case, prompts
from v4surgery.errors import OutputError
from v4surgery.slicers.verify import Verification
from v4surgery.validation.behaviour import BLOCK_TAPS, WAYS, Behaviour, LayerBehaviour
from v4surgery.validation.charts import Scale
from v4surgery.validation.measures import Closeness, LogitAgreement
from v4surgery.validation.report import render_report, write_report
from v4surgery.validation.thresholds import Check, summarize_behaviour
from v4surgery.validation.verdict import Assignment, BrokenTensor, Setting, Validation

HOSTILE = "<script>alert('x')</script>&\"</title>"
VOID = {"meta", "br", "circle", "rect", "line", "polyline", "input", "img"}


@pytest.fixture(scope="module")
def found(tiny_case: Case) -> Validation:
    with v4surgery.open(tiny_case.replica) as replica:
        ids = prompts(replica.config.vocab_size, (27, 9))
        return v4surgery.validate(replica, tiny_case.parent, ids, masked=True, workers=1)


def closeness(error: float) -> Closeness:
    close = Closeness()
    close.add(torch.tensor([[1.0 + error]]), torch.tensor([[1.0]]), 0)
    return close


def large(num_parent: int, num_layers: int) -> Validation:
    """A report of many layers, with every kind of value and hostile names."""
    layers, sources = [], [i * num_parent // num_layers for i in range(num_layers)]
    for i, source in enumerate(sources):
        layer = LayerBehaviour(f"layers.{i}.", f"layers.{source}.", "ratio 128, score")
        for way in WAYS:
            layer.cka[way] = 1 - i / num_layers / 2
            layer.router[way].add(torch.tensor([[0, 1]]), torch.tensor([[0, i % 3]]))
            for t, tap in enumerate(BLOCK_TAPS):
                error = 0.0 if t == 0 else 10.0 ** (-6 + (i + t) % 8)
                layer.taps[way][tap] = closeness(math.nan if (i, t) == (2, 5) else error)
        layers.append(layer)
    behaviour = Behaviour(layers, closeness(0), LogitAgreement())
    behaviour.ran = {"parent": {f"operation_{i}": 10**i for i in range(12)}, "replica": {}}
    behaviour.logits.add(torch.randn(5, 9), torch.randn(5, 9), torch.zeros(5, dtype=torch.int64))
    kinds = [((0, 4, 128, 7)[i % 4], i < 3) for i in range(num_parent)]
    name = "layers.17.attn.indexer.compressor." + "x" * 60
    return Validation(
        replica=HOSTILE,
        parent="org/" + "long-name-" * 12,
        recipe="mini3b",
        setting=Setting("cuda:0", "Some GPU", "exact", "float32", "reference", 4, 2048, "2", "1"),
        verification=Verification(12345, 10**11, False, (f"{name}: 3 of 9 bytes differ",)),
        broken=(BrokenTensor(name, "layers.17", "attn", "3 of 9 bytes differ"),),
        masked=None,
        behaviour=behaviour,
        not_run=None,
        checks=(
            Check("taught_error", 1.0, 0.5, True),
            Check("relative_error", 1.0, 5.0, True),
            Check("router_agreement", 0.5, 0.25, False),
        ),
        numbers=summarize_behaviour(behaviour),
        assignment=Assignment(tuple(kinds), tuple(kinds[s] for s in sources), tuple(sources)),
        transforms={"copy": 3, "gather": 12000, "dequantize": 20, "remap": 3},
    )


class Balanced(HTMLParser):
    """Fails on a tag that is closed where another one is open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, _: object) -> None:
        if tag not in VOID or tag in ("circle", "rect", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, _: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def text_of(html: str) -> str:
    page = Balanced()
    page.feed(html.replace("<!doctype html>", "").replace('<meta charset="utf-8">', ""))
    assert page.open == []
    return " ".join(" ".join(page.text).split())


def test_the_page_says_verdict_grades_numbers_and_what_ran(found: Validation) -> None:
    text = text_of(render_report(found))
    for part in (
        "Pass : replica",
        "Checked: bytes, function and behaviour (reported: no thresholds).",
        "rounding is at most 1e-05",
        "Error by depth",
        "Layer by place",
        "Router agreement",
        "Linear CKA",
        "Where the layers come from",
        "Every byte of every tensor is what the plan makes of the parent.",
        "sparse_attention",
        "layer of the replica",
    ):
        assert part in text, part
    for name in found.numbers:
        assert name in text
    assert all(worst.layer in text for worst in found.worst_layers)


def test_the_page_needs_nothing_else(found: Validation) -> None:
    html = render_report(found)
    assert not re.search(r"https?:|src=|href=|url\(|@import|<script", html)


def test_verdict_stands_before_everything_else(found: Validation) -> None:
    html = render_report(found)
    body = html[html.index("<body>") :]
    assert body.index('class="pass"') < body.index("<section>")


def test_failures_stand_in_the_page_and_names_are_escaped() -> None:
    html = render_report(large(43, 28))
    assert HOSTILE not in html and "<script" not in html
    text = text_of(html)
    assert "Fail" in text and HOSTILE in text and "bytes differ" in text
    assert "taught_error is 1, and the recipe wants at most 0.5" in text
    assert "NaN" in text


@pytest.mark.parametrize("num_layers", [1, 2])
def test_few_layers_can_be_drawn(num_layers: int) -> None:
    assert "nan" not in re.sub(r"<title>.*?</title>", "", render_report(large(3, num_layers)))


def test_models_that_were_not_run_have_no_charts_of_activations() -> None:
    silent = replace(large(3, 2), behaviour=None, not_run="a hash table is wrong", numbers={})
    text = text_of(render_report(silent))
    assert "a hash table is wrong" in text and "Error by depth" not in text
    assert "Where the layers come from" in text


def test_writing_again_replaces_both_files(found: Validation, tmp_path: Path) -> None:
    first = write_report(large(3, 2), tmp_path / "deep" / "er")
    assert [path.name for path in first] == ["report.html", "validation.json"]
    again = write_report(found, tmp_path / "deep" / "er")
    assert again == first and sorted(again[0].parent.iterdir()) == sorted(again)
    assert json.loads(again[1].read_text())["verdict"] == "pass"


def test_a_folder_that_cannot_be_is_an_output_error(found: Validation, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="the report cannot be written"):
        write_report(found, tmp_path / "file" / "report")


def test_scales_put_zero_below_every_decade_and_keep_the_order() -> None:
    values = [0.0, 3e-7, 1e-3, 0.5, 40.0]
    scale = Scale.of([*values, math.nan, math.inf], is_log=True)
    shares = [scale.share(value) for value in values]
    assert shares[0] == 0 and shares == sorted(shares) and len(set(shares)) == 5
    assert max(shares) <= 1 == scale.share(math.inf) == scale.share(math.nan)
    assert len(scale.ticks()) <= 8
    flat = Scale.of([], is_log=False)
    assert [flat.share(value) for value in (-1.0, 0.25, 2.0)] == [0.0, 0.25, 1.0]


# In a browser

# Text of a picture must lie inside it and on no other text; turned text is left out, whose
# upright box is larger than itself. A cell that is wider than its column would run into the next.
PROBE = """<script>
const bad = [], root = document.documentElement;
if (root.scrollWidth > innerWidth) bad.push(`page ${root.scrollWidth} wide in ${innerWidth}`);
let seen = 0;
for (const svg of document.querySelectorAll('svg')) {
  if (!svg.getClientRects().length) continue;
  seen += 1;
  const box = svg.getBoundingClientRect();
  if (box.right > innerWidth || box.left < 0) bad.push(`picture leaves the page`);
  const texts = [...svg.querySelectorAll('text:not([transform])')].map(
    t => [t.textContent, t.getBoundingClientRect()]);
  texts.forEach(([a, r], i) => {
    if (r.left < box.left - 1 || r.right > box.right + 1 || r.top < box.top - 2
        || r.bottom > box.bottom + 4) bad.push(`"${a}" leaves its picture`);
    texts.slice(i + 1).forEach(([b, s]) => {
      if (Math.min(r.right, s.right) - Math.max(r.left, s.left) > 0.5
          && Math.min(r.bottom, s.bottom) - Math.max(r.top, s.top) > 3)
        bad.push(`"${a}" lies on "${b}"`);
    });
  });
}
for (const cell of document.querySelectorAll('td, th'))
  if (cell.scrollWidth > cell.clientWidth + 1) bad.push(`cell ${cell.textContent.trim()}`);
document.title = JSON.stringify({width: innerWidth, seen, bad});
</script>"""


def find_chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("no Chromium here; `apt-get install chromium` lets this test look at the report")


def looked_at(html: str, width: int, folder: Path) -> dict[str, Any]:
    """What the probe says of a page in a frame of a width; windows are not as narrow as 400."""
    inner = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    inner = inner.replace("</body>", PROBE + "</body>")
    host = folder / "host.html"
    host.write_text(
        f'<meta charset="utf-8"><iframe width="{width}" height="2000" style="border:0" '
        f'srcdoc="{escape(inner)}"></iframe><pre></pre><script>onload = () => '
        "document.querySelector('pre').textContent = frames[0].document.title</script>",
        encoding="utf-8",
    )
    command = [
        find_chromium(),
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
        *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
        f"--user-data-dir={folder / 'profile'}",
        "--window-size=1400,2000",
        "--dump-dom",
        host.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    said = re.findall(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    found: dict[str, Any] = json.loads(unescape(said[-1]))
    return found


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("size", [(12, 6), (61, 43)], ids=["small", "large"])
def test_nothing_overlaps_in_a_browser(width: int, size: tuple[int, int], tmp_path: Path) -> None:
    seen = looked_at(render_report(large(*size)), width, tmp_path)
    assert seen["width"] in (width, width - 15) and seen["seen"] >= 8
    assert seen["bad"] == []


def test_the_browser_test_sees_what_is_too_wide_and_what_overlaps(tmp_path: Path) -> None:
    spoiled = render_report(large(12, 6)).replace(
        "<header>",
        '<header><div style="width: 1300px">wide</div><svg width="90" height="30">'
        '<text x="5" y="20">over</text><text x="9" y="20">lapping</text></svg>',
    )
    bad = looked_at(spoiled, 1280, tmp_path)["bad"]
    assert any(line.startswith("page ") for line in bad)
    assert '"over" lies on "lapping"' in bad
