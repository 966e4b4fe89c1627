"""What became of runs: ``python -m accel_pretrain.report RUN... [-o report.html]`` writes one page that needs nothing else.

Summary, curves to hover over and zoom into, samples through time, plan against run, settings that differ, and what befell each
run. It opens from a disk, without a network, light or dark; it is written from a run's files alone, also while the run goes on.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accel_pretrain import report_figures, report_page
from accel_pretrain.curves import Run, metrics_path, read_runs
from accel_pretrain.errors import ConfigError, PretrainError, refuse, reported
from accel_pretrain.look import RUN_COLOURS
from accel_pretrain.report_facts import MOST_EVENTS, Event, defaults, differences, events, hindsight, samples, settings, summary
from accel_pretrain.report_page import folded, table, texts
from accel_pretrain.typed_yaml import load, option, parse_command_line

USAGE = """\
usage: python -m accel_pretrain.report RUN... [--out FILE]

  RUN              a run directory, or a metrics.jsonl
  --out, -o FILE   where to; else RUN/report.html, or report.html here for several runs
  --smooth N       rows that the moving median of noisy curves spans; 1: none; else 1/25 of all
  --help           show this
"""
NO_PLAN = "Nobody has planned this run; type: python -m accel_pretrain.plan --config C.yaml --save, before the next one."


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What ``accel_pretrain.report`` can be told besides the runs."""

    out: Path | None = option(None, "the page to write")
    smooth: int | None = option(None, "rows that the moving median of noisy curves spans; 1: none; null: 1/25 of all")

    def __post_init__(self) -> None:
        refuse((self.smooth is not None and self.smooth < 1, f"smooth: must be at least 1, got {self.smooth}"))


def main(argv: Sequence[str] | None = None) -> int:
    with reported():
        words = sys.argv[1:] if argv is None else argv
        line = parse_command_line(ReportConfig, words, flags={"help"}, short={"-h": "help", "-o": "out"}, positionals=True)
        if "help" in line.flags:
            print(USAGE, end="")
            return 0
        out = report([Path(word) for word in line.positionals], load(ReportConfig, line.config, line.overrides))
        print(f"wrote {out}")
        return 0
    return 2


def report(paths: Sequence[Path], config: ReportConfig) -> Path:
    """Write the page about the runs at ``paths``, and return where it is."""
    if not paths:
        raise ConfigError("no run given; type: python -m accel_pretrain.report RUN")
    out = config.out
    if out is None:
        out = Path("report.html") if len(paths) > 1 else metrics_path(paths[0]).with_name("report.html")
    text = render(read_runs(paths), config.smooth)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(text.encode("utf-8", errors="replace"))  # of a path that is no text
    except OSError as error:
        raise ConfigError(f"out: cannot write {out.absolute()} ({error.strerror}); type --out FILE") from None
    return out


def render(runs: Sequence[Run], smooth: int | None = None) -> str:
    """The page about some runs."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    body = [
        f"<h1>{report_page.escaped(title)}</h1>",
        f"<p>Written {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC, from what the runs have recorded until then.</p>",
        overview(runs),
    ]
    panels = report_figures.panels_of(runs)
    if panels:
        body += ["<h2>Curves</h2>", how_to_read(runs), curves(runs, smooth)]
    body += [section for part in (sampled, planned, configured, befell) for section in part(runs)]
    return report_page.page(title, body, library() if panels else "")


def library() -> str:
    """The source of BokehJS: only the part that draws."""
    try:
        from bokeh.resources import Resources
    except ImportError:
        raise PretrainError("a report needs bokeh: pip install 'accel_pretrain[report]'") from None
    parts = Resources(mode="inline", components=["bokeh"]).js_raw
    return "\n".join(part for part in parts if not part.startswith("Bokeh.set_log_level")).replace("\r\n", "\n")


# ------------------------------------------------------------------------------------------------------------- sections


def overview(runs: Sequence[Run]) -> str:
    facts = [summary(run) for run in runs]
    names = dict.fromkeys(name for own in facts for name in own)
    header = ["", *(run.name for run in runs)] if len(runs) > 1 else []
    return table(header, [[name, *(own.get(name, "") for own in facts)] for name in names])


def how_to_read(runs: Sequence[Run]) -> str:
    """What the signs mean, and what of a long run is shown."""
    signs = "Rings: loss evaluated on training text; discs: on validation text, with its standard error. "
    key = "Blue: training; orange: validation. " if len(runs) == 1 else ""
    zoom = "Drag to zoom, hover for values; the tools of a panel appear above it. "
    rows = max((len(run.rows) for run in runs), default=0)
    long = "Of long runs the lowest and highest rows of every group are drawn: no spike is left out." if rows > 1000 else ""
    return f"<p>{report_page.escaped(key + signs + zoom + long)}</p>"


def curves(runs: Sequence[Run], smooth: int | None) -> str:
    axes = {name: label for name, (label, _) in report_figures.axes_of(runs).items()}
    coloured = [(run.name, colour) for run, colour in zip(runs, itertools.cycle(RUN_COLOURS))] if len(runs) > 1 else []
    return report_page.curves(report_figures.document(runs, smooth), axes, coloured)


def sampled(runs: Sequence[Run]) -> list[str]:
    """What the models wrote on the way."""
    found = [(run, own) for run in runs if (own := samples(run))]
    parts = [folded(f"{run.name}: {len(own)} samples", texts(own), is_open=len(runs) == 1) for run, own in found]
    return ["<h2>Samples</h2>", *parts] if found else []


def planned(runs: Sequence[Run]) -> list[str]:
    """What the plan said, and what happened."""
    sections = ["<h2>Plan and run</h2>"]
    for run in runs:
        name = f"<p>{report_page.escaped(run.name)}</p>" if len(runs) > 1 else ""
        if rows := hindsight(run):
            sections.append(name + table(["", "planned", "run", "difference"], rows))
    return sections if len(sections) > 1 else [*sections, f"<p>{NO_PLAN}</p>"]


def configured(runs: Sequence[Run]) -> list[str]:
    """The settings in which runs differ; of a single run, those that are not the defaults."""
    configs = [settings(run) for run in runs]
    if not any(configs):
        return []
    if len(runs) == 1:
        changed = [row for row in differences([configs[0], defaults()]) if row[0] in configs[0]]
        shown = table(["", "this run", "default"], [(key, *values) for key, values in changed])
    else:
        rows = differences(configs)
        same = "<p>The configs of these runs are the same.</p>"
        shown = table(["", *(run.name for run in runs)], [(key, *values) for key, values in rows]) if rows else same
    every = [
        folded(f"All settings of {run.name}", table([], own.items())) for run, own in zip(runs, configs, strict=True) if own
    ]
    return ["<h2>Settings</h2>", shown, *every]


def befell(runs: Sequence[Run]) -> list[str]:
    """Starts, resumes, skipped updates, faults, the end."""
    sections = ["<h2>What happened</h2>"]
    for run in runs:
        found = events(run)
        left_out = f" ({len(found) - MOST_EVENTS:,} in the middle are not shown)" if len(found) > MOST_EVENTS else ""
        if left_out:
            found = [*found[: MOST_EVENTS // 2], *found[-MOST_EVENTS // 2 :]]
        name = f"{run.name}{left_out}" if len(runs) > 1 else left_out.strip()
        content = table(["Time (UTC)", "Update", ""], [_line(event) for event in found], [event.kind for event in found])
        sections.append((f"<p>{report_page.escaped(name)}</p>" if name else "") + content if found else "")
    return sections if any(sections[1:]) else []


def _line(event: Event) -> tuple[str, str, str]:
    return event.when, f"{event.step:,.0f}" if event.step == event.step else "", event.text


if __name__ == "__main__":
    sys.exit(main())
