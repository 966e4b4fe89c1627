"""The HTML of a report: one file that loads nothing, light or dark as the reader's system is.

Every text that comes from outside goes through :func:`escaped` (or :func:`data`). Besides, the page's own policy lets only the
two scripts run whose hashes it names: Bokeh's, and :data:`SCRIPT`.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

STYLE = """
:root { color-scheme: light dark; --ink: #222; --soft: #6a6a6a; --line: #dedede; --paper: #fff; --band: #f5f6f7; --bad: #b3261e;
  --good: #2e7d4f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e4e4; --soft: #9b9b9b; --line: #3a3d41; --paper: #17191c;
  --band: #202327; --bad: #ff8a80; --good: #7fc99a; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto; padding: 1.5rem;
  max-width: 1240px; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p, caption { color: var(--soft); } p { margin: .3rem 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .28rem .9rem .28rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; min-width: 5rem; }
th { font-weight: 600; white-space: nowrap; } tbody th { font-weight: 400; color: var(--soft); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--band); padding: .6rem .8rem; margin: .2rem 0 .8rem;
  font-size: 13px; } pre b { color: var(--soft); }
summary { cursor: pointer; } details details { margin-left: 1rem; } .fault { color: var(--bad); } .end { color: var(--good); }
.controls { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; align-items: center; margin: .6rem 0 1rem; }
.swatch { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin-right: .35rem; vertical-align: -1px; }
#curves { min-height: 280px; --background-color: var(--paper); --color: var(--ink);
  --bk-text-color: var(--ink); --bk-axis-label-text-color: var(--soft); --bk-major-label-text-color: var(--soft);
  --bk-axis-line-color: var(--line); --bk-major-tick-line-color: var(--line); --bk-minor-tick-line-color: transparent;
  --bk-grid-line-color: var(--line); }
"""

SCRIPT = """"use strict";
(async () => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const item = read("curves-json"), axes = read("axes-json");
  const manager = await Bokeh.embed.embed_item(item, "curves");
  const views = manager.roots ?? [...manager];
  const figures = views[0].model.children;
  const choice = document.getElementById("axis");
  const median = document.getElementById("median");
  const boxes = [...document.querySelectorAll("input[data-run]")];
  choice.addEventListener("change", () => {
    for (const figure of figures) {
      for (const { glyph } of figure.renderers) {
        for (const end of "x0" in glyph.properties ? ["x0", "x1"] : ["x"]) glyph[end] = { field: choice.value };
      }
      figure.below[0].axis_label = axes[choice.value];
      figure.reset.emit();
    }
  });
  const show = () => {
    const hidden = new Set(boxes.filter((box) => !box.checked).map((box) => Number(box.dataset.run)));
    for (const figure of figures) {
      for (const renderer of figure.renderers) {
        renderer.visible = !hidden.has(renderer.tags[0]) && (median.checked || renderer.tags[1] !== "median");
      }
    }
  };
  for (const box of [...boxes, median]) box.addEventListener("change", show);
  const repaint = () => { for (const view of views[0].child_views) view.request_repaint(); };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  document.body.dataset.ready = Math.round(performance.now());
})();
"""


def escaped(text: object) -> str:
    """Text as HTML: nothing in it is a tag, an entity or the end of an attribute."""
    return html.escape(str(text), quote=True)


def data(name: str, value: Any) -> str:
    """A value for the page's script, as JSON that no HTML parser can see an end of."""
    return f'<script type="application/json" id="{name}">{json.dumps(value).replace("<", chr(92) + "u003c")}</script>'


def table(header: Sequence[str], rows: Iterable[Sequence[object]], classes: Sequence[str] = ()) -> str:
    """Rows whose first cell names them; ``classes``, one per row, where they look different."""
    head = "".join(f"<th>{escaped(cell)}</th>" for cell in header)
    lines = []
    for number, (first, *rest) in enumerate(rows):
        mark = f' class="{escaped(classes[number])}"' if classes else ""
        cells = "".join(f"<td>{escaped(cell)}</td>" for cell in rest)
        lines.append(f"<tr{mark}><th>{escaped(first)}</th>{cells}</tr>")
    top = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
    return f'<div class="wide"><table>{top}<tbody>{"".join(lines)}</tbody></table></div>'


def folded(title: str, content: str, *, is_open: bool = False) -> str:
    """Content that is shown when somebody asks for it."""
    return f"<details{' open' if is_open else ''}><summary>{escaped(title)}</summary>{content}</details>"


def texts(samples: Sequence[tuple[int, str, str]]) -> str:
    """Prompts and what was generated after them, update by update; the last is open."""
    return "".join(
        folded(
            f"After update {step:,}",
            "".join(f"<pre><b>{escaped(prompt)}</b>{escaped(text)}</pre>" for own, prompt, text in samples if own == step),
            is_open=step == samples[-1][0],
        )
        for step in dict.fromkeys(step for step, _, _ in samples)
    )


def curves(document: Mapping[str, Any], axes: Mapping[str, str], runs: Sequence[tuple[str, str]]) -> str:
    """The place for the curves, and what a reader can choose. ``runs``: name and colour of each, none for a single one."""
    options = "".join(f'<option value="{escaped(name)}">{escaped(label)}</option>' for name, label in axes.items())
    boxes = "".join(
        f'<label><input type="checkbox" data-run="{number}" checked> <span class="swatch" style="background:{escaped(colour)}">'
        f"</span>{escaped(name)}</label>"
        for number, (name, colour) in enumerate(runs)
    )
    return (
        f'<div class="controls"><label>Over <select id="axis">{options}</select></label>'
        f'<label><input type="checkbox" id="median" checked> moving median</label>{boxes}</div><div id="curves"></div>'
        f"{data('axes-json', dict(axes))}{data('curves-json', document)}"
    )


def page(title: str, body: Sequence[str], library: str) -> str:
    """The whole file. ``library`` is the source of BokehJS; without curves it is empty, and no script runs at all."""
    scripts = [library, SCRIPT] if library else []
    policy = " ".join(f"'sha256-{_digest(script)}'" for script in scripts) or "'none'"
    allowed = f"default-src 'none'; script-src {policy}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'"
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{escaped(allowed)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escaped(title)}</title><style>{STYLE}</style></head><body>",
            *body,
            *(f"<script>{script}</script>" for script in scripts),
            "</body></html>",
        ]
    )


def _digest(script: str) -> str:
    """As a browser hashes it, which reads CR LF as LF."""
    assert "</script" not in script.lower()
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
