"""Results as a person reads them: the table in perf/README.md and one picture per scenario.

python -m perf.report perf/results/FILE.json     write both again from a result
"""

from __future__ import annotations

import json
import statistics
import sys
from html import escape
from pathlib import Path
from typing import Any

from perf.host import ROOT
from perf.scenarios import SCENARIOS
from perf.targets import (
    TARGETS,
    added,
    beside,
    cheapest_relay,
    paired,
    values,
    verdicts,
)

README = ROOT / "perf" / "README.md"
PICTURES = ROOT / "perf" / "results" / "pictures"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
ORDER = (
    "direct",
    "fastmesh",
    *(beside(name) for name in SCENARIOS),
    "haproxy",
    "nginx",
    "envoy",
    "mosn",
)
COLOURS = {
    "direct": "#9aa0a6",
    "fastmesh": "#0b7a4b",
    "haproxy": "#4a7fc1",
    "nginx": "#7a9fd0",
    "envoy": "#a4bfe0",
    "mosn": "#c9a24a",
}


def median(numbers: list[float]) -> float | None:
    return statistics.median(numbers) if numbers else None


def best_relay(scenario: dict[str, Any]) -> tuple[str, float] | None:
    """The relay with the least CPU per message, and fastmesh's paired ratio to it."""
    best = cheapest_relay(scenario)
    ratio = median(paired(scenario, "cpu_us_per_message", "fastmesh", best)) if best else None
    return (best, ratio) if best is not None and ratio is not None else None


def relay_target(name: str) -> float | None:
    """What a message should cost at most there, as a share of the cheapest relay's CPU."""
    found = [t.most for t in TARGETS if (t.scenario, t.kind, t.against) == (name, "cpu", "relays")]
    return found[0] if found else None


def errors(result: dict[str, Any]) -> list[str]:
    """Every trial in which anything but right answers came."""
    wrong = []
    for name, scenario in result["scenarios"].items():
        for number, measured in enumerate(scenario["rounds"], 1):
            for contender, trial in measured.items():
                if trial["errors"] or not trial["answered"]:
                    wrong.append(
                        f"{name} round {number} {contender}: {trial['errors'] or 'no answer'}"
                    )
    return wrong


def _number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _spread(numbers: list[float], digits: int = 0) -> str:
    if not numbers:
        return "–"
    middle = f"{statistics.median(numbers):,.{digits}f}"
    if len(numbers) < 2:
        return middle
    return f"{middle} ({min(numbers):,.{digits}f}–{max(numbers):,.{digits}f})"


def _mib(value: float | None) -> str:
    return "–" if value is None else f"{value / (1 << 20):.1f}"


def rows(scenario: dict[str, Any]) -> list[list[str]]:
    table = []
    for name in ORDER:
        if name in scenario["left_out"] and not values(scenario, name, "answered"):
            table.append([name, f"left out: {scenario['left_out'][name]}"])
            continue
        if not values(scenario, name, "answered"):
            continue
        calls = scenario["syscalls_per_message"].get(name)
        table.append(
            [
                name,
                _spread(values(scenario, name, "throughput_per_s")),
                _number(median(values(scenario, name, "p50_us"))),
                _number(median(values(scenario, name, "p99_us"))),
                "–" if name == "direct" else _number(median(added(scenario, name, "p50_us"))),
                "–" if name == "direct" else _number(median(added(scenario, name, "p99_us"))),
                _spread(values(scenario, name, "cpu_us_per_message"), 2),
                _number(sum(calls.values()), 2) if calls else "–",
                _mib(median(values(scenario, name, "rss_bytes"))),
                _number(median(values(scenario, name, "rss_per_idle_connection_bytes"))),
            ]
        )
    return table


HEAD = (
    "contender",
    "answers/s",
    "p50 µs",
    "p99 µs",
    "added p50",
    "added p99",
    "proxy CPU µs/message",
    "system calls/message",
    "RSS MiB",
    "bytes/idle connection",
)


def _edition(known: dict[str, Any]) -> str:
    if "missing" in known:
        return f"MISSING, {known['missing']}"
    return str(known.get("version") or known["what"])


def text(result: dict[str, Any]) -> str:
    """The table, in Markdown; readable in a terminal as it is."""
    facts = result["host"]
    lines = [
        f"{result['date']}, commit {facts['commit']}, {facts['cpus']} × {facts['cpu']}, kernel "
        f"{facts['kernel']}, congestion control {facts['congestion_control']}, "
        f"{result['duration_ms']} ms per trial.",
        "Median of the rounds (smallest–largest). Latencies of closed loops include the queue that "
        "the load itself makes; `added` is the difference to the direct path of the same round.",
        "",
        "Contenders: "
        + "; ".join(f"**{name}** {_edition(known)}" for name, known in result["contenders"].items())
        + ".",
        "",
        "| " + " | ".join(("scenario", *HEAD)) + " |",
        "|--" * (len(HEAD) + 1) + "|",
    ]
    if result["kept_stolen_rounds"]:
        lines.insert(
            2, "**Rounds in which the host stole time were kept: these figures decide nothing.**"
        )
    for name, scenario in result["scenarios"].items():
        first = f"[**{name}**](results/pictures/{name}.svg) {scenario['title']}"
        relay = best_relay(scenario)
        notes = [f"{len(scenario['rounds'])} rounds"]
        if scenario["discarded"]:
            notes.append(f"{len(scenario['discarded'])} thrown away")
        if relay:
            notes.append(f"CPU of fastmesh / {relay[0]} = {relay[1]:.2f}")
        first += " (" + ", ".join(notes) + ")"
        for row in rows(scenario):
            cells = row + [""] * (len(HEAD) - len(row))
            lines.append("| " + " | ".join((first, *cells)) + " |")
            first = ""
    return "\n".join([*lines, "", *targets(result)])


def targets(result: dict[str, Any]) -> list[str]:
    """Each target that the result can judge, in Markdown."""
    lines = ["| scenario | target | bound | median (rounds) | |", "|--|--|--|--|--|"]
    for verdict in verdicts(result):
        digits = 4 if verdict.target.most < 0.01 else 0 if verdict.target.most > 10 else 2
        bound = f"≤ {_number(verdict.target.most, min(digits, 3))}"
        mark = verdict.text if verdict.text == "met" else f"**{verdict.text}**"
        lines.append(
            f"| {verdict.target.scenario} | {verdict.target.what} | {bound} "
            f"| {_spread(verdict.rounds, digits)} | {mark} |"
        )
    return lines


def publish(result: dict[str, Any], source: Path) -> None:
    """The table between the markers of the README, and the pictures."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name, scenario in result["scenarios"].items():
        (PICTURES / f"{name}.svg").write_text(picture(name, scenario))
    page = README.read_text()
    start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    where = f"From [{source.name}](results/{source.name}).\n"
    README.write_text(page[:start] + "\n" + where + "\n" + text(result) + "\n" + page[end:])


# --- pictures -------------------------------------------------------------------------------------

WIDTH, PANEL, BAR, GAP, LEFT, TOP = 900, 210, 22, 10, 112, 88


def headline(name: str, scenario: dict[str, Any]) -> str:
    """The one sentence that a picture is about: fastmesh's CPU beside the cheapest relay's and
    MOSN's.
    """
    said = []
    for against in (cheapest_relay(scenario), "mosn"):
        ratio = median(paired(scenario, "cpu_us_per_message", "fastmesh", against or ""))
        if ratio is not None:
            said.append(f"{ratio:.2f} of {against}'s")
    bound = relay_target(name)
    target = f" (target, dashed: {bound:.2f} of the cheapest relay's)" if bound else ""
    return f"fastmesh's CPU per message: {', '.join(said)}{target}" if said else ""


def picture(name: str, scenario: dict[str, Any]) -> str:
    """Two panels of bars, shorter is better: proxy CPU per message with a dashed line where
    fastmesh should be, and latency (p50 solid, p99 as a whisker): added to the direct path in an
    open loop, as it is in a closed one.
    """
    shown = [who for who in ORDER if values(scenario, who, "answered")]
    height = TOP + len(shown) * (BAR + GAP) + 34
    cpu = {who: median(values(scenario, who, "cpu_us_per_message")) for who in shown}
    bars, ends, what = {}, {}, "latency"
    for who in shown:
        if "rate" not in scenario["load"]:
            bars[who] = median(values(scenario, who, "p50_us"))
            ends[who] = median(values(scenario, who, "p99_us"))
        elif who != "direct":
            what = "added latency"
            bars[who] = median(added(scenario, who, "p50_us"))
            ends[who] = median(added(scenario, who, "p99_us"))
    bound, relay = relay_target(name), cheapest_relay(scenario)
    wanted = bound * (cpu.get(relay) or 0.0) if bound and relay else None
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="DejaVu Sans, Verdana, sans-serif" font-size="13" fill="#222">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="16" y="24" font-size="16" font-weight="bold">{escape(scenario["title"])}</text>',
        f'<text x="16" y="46" fill="#0b7a4b">{escape(headline(name, scenario))}</text>',
    ]
    parts += _panel(
        LEFT, "proxy CPU per message, µs (shorter is better)", shown=shown, bars=cpu, ends={}
    )
    parts += _panel(
        LEFT + 410, f"{what}, µs: bar p50, line to p99", shown=shown, bars=bars, ends=ends
    )
    if wanted is not None:
        x = LEFT + wanted / (max(v for v in cpu.values() if v) or 1.0) * PANEL
        bottom = TOP + len(shown) * (BAR + GAP) - GAP
        parts.append(
            f'<path d="M{x:.1f} {TOP - 4}V{bottom + 4}" stroke="#c0392b" stroke-width="1.5" '
            f'stroke-dasharray="4 3"/>'
        )
    for at, who in enumerate(shown):
        y = TOP + at * (BAR + GAP) + 16
        weight = ' font-weight="bold"' if who == "fastmesh" else ""
        parts.append(f'<text x="{LEFT - 8}" y="{y}" text-anchor="end"{weight}>{escape(who)}</text>')
    note = f"{len(scenario['rounds'])} rounds, medians; {scenario['placement']}"
    parts.append(f'<text x="16" y="{height - 12}" font-size="11" fill="#777">{escape(note)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _colour(name: str) -> str:
    return COLOURS.get(name, "#69ad8c")  # fastmesh, run another way


def _panel(
    left: int,
    title: str,
    *,
    shown: list[str],
    bars: dict[str, float | None],
    ends: dict[str, float | None],
) -> list[str]:
    most = max([v for v in (*bars.values(), *ends.values()) if v is not None], default=1.0) or 1.0
    parts = [f'<text x="{left}" y="{TOP - 14}" fill="#555">{escape(title)}</text>']
    for at, name in enumerate(shown):
        value = bars.get(name)
        y = TOP + at * (BAR + GAP)
        if value is None:
            parts.append(f'<text x="{left}" y="{y + 16}" fill="#999">no proxy</text>')
            continue
        size = max(1.0, value / most * PANEL)
        parts.append(
            f'<rect x="{left}" y="{y}" width="{size:.1f}" height="{BAR}" fill="{_colour(name)}"/>'
        )
        label = f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
        end = ends.get(name)
        reach = size
        if end is not None:
            reach = max(size, end / most * PANEL)
            middle = y + BAR / 2
            parts.append(
                f'<path d="M{left + size:.1f} {middle}H{left + reach:.1f}m0 -5v10" '
                f'stroke="{_colour(name)}" stroke-width="2" fill="none"/>'
            )
            label += f" / {end:,.0f}"
        parts.append(f'<text x="{left + reach + 6:.1f}" y="{y + 16}">{label}</text>')
    return parts


if __name__ == "__main__":
    chosen = Path(sys.argv[1])
    publish(json.loads(chosen.read_text()), chosen)
