"""What clients saw of a replacement, as a person reads it: a table in perf/README.md, a picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import Any

from perf import host
from perf.replacing import WAYS
from perf.report import COLOURS

PICTURES = host.ROOT / "perf" / "results" / "pictures"
README = host.ROOT / "perf" / "README.md"
BEGIN, END = "<!-- upgrade: begin -->", "<!-- upgrade: end -->"
PAUSE_MS_MOST, PAUSE_SIZE = 50.0, "c10000"
"""fastmesh must not stand still for longer, at that size."""


@dataclass(frozen=True)
class Trial:
    """What the clients saw, and what the contender said."""

    connections: int
    rate_per_s: float
    upgrades: int
    kept: int
    resets: int
    failed: dict[str, int]
    """Requests, by kind."""
    broken: dict[str, int]
    """Connections, by kind; one that is not let in again counts each time."""
    answered: int
    gap_before_ms: float
    """Of a watcher, before the first replacement."""
    gaps_ms: list[float]
    """Of a watcher, during each replacement and until the next."""
    slowest_ms: float
    """Answer to a request of any connection, counted from when it was due."""
    errors_s: float | None
    """From the first error to the last one."""
    gone_s: list[float | None]
    """From the command until the old process had ended; None = it had not when the trial ended."""
    command_s: list[float]
    newcomers: int
    newcomers_failed: dict[str, int]
    newcomer_slowest_ms: float
    reports: list[dict[str, Any]]

    @property
    def pauses_ms(self) -> list[float]:
        """Of every engine thread at every replacement, as the contender reports them."""
        return [float(pause) for report in self.reports for pause in report.get("pause_ms", [])]


def quantile(values: list[float], q: float) -> float:
    """The value that a share q of all does not exceed; of few values that is the largest soon."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]


HEAD = (
    "connections",
    "contender",
    "load /s",
    "kept",
    "resets",
    "requests failed",
    "longest gap ms (before)",
    "slowest answer ms",
    "newcomers failed",
    "old process gone s",
    "pause ms p50 / p99 / max",
)


def entry(result: dict[str, Any], size: str, name: str) -> list[Trial]:
    found = result["sizes"].get(size, {}).get(name, {})
    return [Trial(**trial) for trial in found.get("trials", [])]


def worst(trials: list[Trial]) -> dict[str, int]:
    """Failures of all trials together."""
    total: dict[str, int] = {}
    for trial in trials:
        for kind, count in trial.failed.items():
            total[kind] = total.get(kind, 0) + count
    return total


def row(trials: list[Trial]) -> list[str]:
    """Sums over the trials for what must not happen, the worst of them for times."""
    n = len(trials)
    upgrades = sum(trial.upgrades for trial in trials)
    sockets = sum(trial.connections for trial in trials)
    kept = sum(trial.kept for trial in trials)
    failed, asked = worst(trials), sum(trial.answered for trial in trials)
    gone = [one for trial in trials for one in trial.gone_s]
    newcomers_failed = sum(sum(trial.newcomers_failed.values()) for trial in trials)
    pauses = [pause for trial in trials for pause in trial.pauses_ms]
    total = sum(failed.values())
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in failed.items())
    return [
        f"{sum(trial.rate_per_s for trial in trials) / n:,.0f}",
        f"{kept / sockets:.1%} ({kept:,} of {sockets:,}, {upgrades} upgrades)",
        f"{sum(trial.resets for trial in trials):,}",
        f"{total:,} of {asked + total:,}" + (f" ({kinds})" if total else ""),
        f"{max(max(trial.gaps_ms) for trial in trials):,.1f} "
        f"({max(trial.gap_before_ms for trial in trials):,.1f})",
        f"{max(trial.slowest_ms for trial in trials):,.1f}",
        f"{newcomers_failed:,} of {sum(trial.newcomers for trial in trials):,}",
        "not gone" if None in gone else f"{max(one for one in gone if one is not None):.2f}",
        f"{quantile(pauses, 0.5):.2f} / {quantile(pauses, 0.99):.2f} / {max(pauses):.2f}"
        if pauses
        else "–",
    ]


def text(result: dict[str, Any]) -> str:
    """The tables, in Markdown; readable in a terminal as they are."""
    facts = result["host"]
    commits = sorted(
        {entry["commit"] for ways in result["sizes"].values() for entry in ways.values()}
    )
    lines = [
        f"{result['date']}, commit {', '.join(commits)}, {facts['cpus']} × {facts['cpu']}, kernel "
        f"{facts['kernel']}, {facts['open_files_max']:,} descriptors allowed; "
        f"{result['placement']}.",
        "Counts are sums over all upgrades, times the worst of them.",
        "",
        "Contenders: "
        + "; ".join(
            f"**{name}** {known.get('version') or 'MISSING, ' + known['missing']}: {known['how']}"
            for name in WAYS
            if (known := result["contenders"].get(name))
        )
        + ".",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|--" * len(HEAD) + "|",
    ]
    if result["kept_stolen_rounds"]:
        lines.insert(
            2, "**Rounds in which the host stole time were kept: these figures decide nothing.**"
        )
    for size, ways in result["sizes"].items():
        for name in (name for name in WAYS if name in ways):
            trials = entry(result, size, name)
            left_out, failed = ways[name]["left_out"], ways[name]["failed"]
            why = f"failed: {failed}" if failed else f"left out: {left_out}"
            said = row(trials) if trials else [why]
            count = f"{trials[0].connections:,}" if trials else f"{ways[name]['wanted']:,}"
            cells = [count, name, *said]
            lines.append("| " + " | ".join([*cells, *[""] * (len(HEAD) - len(cells))]) + " |")
    return "\n".join([*lines, "", *failures(result), *verdict(result)])


def failures(result: dict[str, Any]) -> list[str]:
    """Trials that ended in anything but figures: no row shows them."""
    return [
        f"**A trial of {name} at {entry['wanted']:,} connections failed: {entry['failed']}**\n"
        for ways in result["sizes"].values()
        for name, entry in ways.items()
        if entry["failed"]
    ]


def verdict(result: dict[str, Any]) -> list[str]:
    """The targets that the result can judge."""
    lines = ["| target | bound | found | |", "|--|--|--|--|"]
    for name in ("fastmesh", "fastmesh (70 %)"):
        at_size = entry(result, PAUSE_SIZE, name)
        pauses = [pause for trial in at_size for pause in trial.pauses_ms]
        if pauses:
            said = "met" if max(pauses) <= PAUSE_MS_MOST else "**missed**"
            lines.append(
                f"| {name}: longest pause at {at_size[0].connections:,} connections "
                f"| ≤ {PAUSE_MS_MOST:.0f} ms | {max(pauses):.2f} ms | {said} |"
            )
        everything = [t for size in result["sizes"] for t in entry(result, size, name)]
        if everything:
            bad = sum(worst(everything).values()) + sum(t.connections - t.kept for t in everything)
            said = "met" if bad == 0 else "**missed**"
            lines.append(
                f"| {name}: requests failed and connections lost in "
                f"{sum(t.upgrades for t in everything)} upgrades | 0 | {bad:,} | {said} |"
            )
    return lines if len(lines) > 2 else []


def publish(result: dict[str, Any]) -> None:
    """The table between the markers of the README, and the picture."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    (PICTURES / "upgrade.svg").write_text(picture(result))
    page = README.read_text()
    start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    README.write_text(f"{page[:start]}\n{text(result)}\n{page[end:]}")


# --- picture --------------------------------------------------------------------------------------

WIDTH, LEFT, TOP, BAR, GAP, PANEL = 900, 150, 88, 18, 6, 190


def picture(result: dict[str, Any]) -> str:
    """Three panels of bars for each size and contender: connections kept, the longest time without
    an answer (on a scale by powers of ten), and how long the old process stayed. Below them
    fastmesh's own pauses.
    """
    shown = [
        (size, name, trials)
        for size in result["sizes"]
        for name in WAYS
        if (trials := entry(result, size, name))
    ]
    paused = [
        (size, name, trials) for size, name, trials in shown if any(t.pauses_ms for t in trials)
    ]
    height = TOP + len(shown) * (BAR + GAP) + len({size for size, *_ in shown}) * 22 + 34
    height += len(paused) * (BAR + GAP) + 46 if paused else 0
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="DejaVu Sans, Verdana, sans-serif" font-size="12" fill="#222">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        '<text x="16" y="24" font-size="16" font-weight="bold">The process is replaced under load'
        "</text>",
        f'<text x="16" y="46" fill="#0b7a4b">{escape(headline(result))}</text>',
    ]
    panels = (
        ("connections kept", kept_share, "%", 100.0, False),
        ("longest gap, ms (by powers of ten)", longest_gap, "", 10000.0, True),
        ("old process gone after, s", longest_stay, "", 60.0, False),
    )
    for at, (title, *_) in enumerate(panels):
        x = LEFT + at * (PANEL + 60)
        parts.append(f'<text x="{x}" y="{TOP - 20}" fill="#555">{escape(title)}</text>')
    y, last = TOP, ""
    for size, name, trials in shown:
        if size != last:
            y += 16
            wanted = result["sizes"][size][name]["wanted"]
            title = f"{wanted:,} connections"
            fewer = {t.connections for s, _, ts in shown if s == size for t in ts} - {wanted}
            title += "".join(f", {count:,} for relays" for count in fewer)
            parts.append(f'<text x="16" y="{y - 2}" font-weight="bold">{title}</text>')
            last = size
            y += 6
        weight = ' font-weight="bold"' if name == "fastmesh" else ""
        parts.append(
            f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end"{weight}>{escape(name)}</text>'
        )
        colour = COLOURS[WAYS[name].contender]
        for at, (_, figure, unit, most, by_tens) in enumerate(panels):
            value = figure(trials)
            x = LEFT + at * (PANEL + 60)
            share = 1.0 if value is None else min(1.0, scaled(value, most, by_tens=by_tens))
            size_px = max(1.0, share * PANEL)
            label = "stays" if value is None else f"{value:,.1f}{unit}"
            parts.append(
                f'<rect x="{x}" y="{y}" width="{size_px:.1f}" height="{BAR}" fill="{colour}"/>'
            )
            parts.append(f'<text x="{x + size_px + 5:.1f}" y="{y + 13}">{label}</text>')
        y += BAR + GAP
    parts += pauses_panel(y + 30, paused)
    note = f"worst of the upgrades of each; {result['placement']}"
    parts.append(f'<text x="16" y="{height - 12}" font-size="11" fill="#777">{escape(note)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def pauses_panel(top: int, paused: list[tuple[str, str, list[Trial]]]) -> list[str]:
    """A bar to the median, a line to the p99 and a tick at the longest, and the bound as a dashed
    line.
    """
    if not paused:
        return []
    found = [[pause for trial in trials for pause in trial.pauses_ms] for *_, trials in paused]
    most, width = max(PAUSE_MS_MOST, *(max(pauses) for pauses in found)), 500
    title = "pause of fastmesh, ms: bar p50, line p99, tick the longest; dashed: the bound"
    parts = [f'<text x="{LEFT}" y="{top}" fill="#555">{title}</text>']
    y = top + 10
    for (_, name, trials), pauses in zip(paused, found, strict=True):
        p50, p99, longest = quantile(pauses, 0.5), quantile(pauses, 0.99), max(pauses)
        bar, line, tick = (max(1.0, value / most * width) for value in (p50, p99, longest))
        colour, middle = COLOURS[WAYS[name].contender], y + BAR / 2
        load = f"{trials[0].connections:,}" + (", 70 %" if WAYS[name].rate == 0 else "")
        parts += [
            f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{load}</text>',
            f'<rect x="{LEFT}" y="{y}" width="{bar:.1f}" height="{BAR}" fill="{colour}"/>',
            f'<path d="M{LEFT + bar:.1f} {middle}H{LEFT + line:.1f}M{LEFT + tick:.1f} {middle - 6}'
            f'v12" stroke="{colour}" stroke-width="2" fill="none"/>',
            f'<text x="{LEFT + tick + 6:.1f}" y="{y + 13}">{p50:.1f} / {p99:.1f} / {longest:.1f} '
            f"of {len(pauses)}</text>",
        ]
        y += BAR + GAP
    x = LEFT + PAUSE_MS_MOST / most * width
    parts.append(
        f'<path d="M{x:.1f} {top + 6}V{y - GAP + 4}" stroke="#c0392b" stroke-width="1.5" '
        f'stroke-dasharray="4 3"/>'
    )
    return parts


def scaled(value: float, most: float, *, by_tens: bool) -> float:
    """Share of a panel: linear, or half a decade from nothing at 1 and all at `most`."""
    if not by_tens:
        return value / most
    decades, at = 0.0, most
    while at > 1:
        at, decades = at / 10, decades + 1
    grown, at = 0.0, max(1.0, value)
    while at >= 10:
        at, grown = at / 10, grown + 1
    return (grown + (at - 1) / 9) / decades


def kept_share(trials: list[Trial]) -> float:
    return 100.0 * sum(t.kept for t in trials) / sum(t.connections for t in trials)


def longest_gap(trials: list[Trial]) -> float:
    return max(max(trial.gaps_ms) for trial in trials)


def longest_stay(trials: list[Trial]) -> float | None:
    gone = [one for trial in trials for one in trial.gone_s]
    return None if None in gone else max(one for one in gone if one is not None)


def headline(result: dict[str, Any]) -> str:
    """The one sentence that the picture is about."""
    trials = entry(result, PAUSE_SIZE, "fastmesh")
    pauses = [pause for trial in trials for pause in trial.pauses_ms]
    if not pauses:
        return ""
    kept = kept_share(trials)
    return (
        f"fastmesh at {trials[0].connections:,} connections: {kept:.4g} % kept, "
        f"{sum(worst(trials).values())} requests failed, paused for {quantile(pauses, 0.5):.1f} ms "
        f"(at most {max(pauses):.1f})"
    )
