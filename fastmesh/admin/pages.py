"""The one page for eyes: /topology, drawn from the JSON of /v1/topology.

Self-contained: no script, no font, no image of elsewhere; the browser asks again every five
seconds. Everything that stands in it was registered or configured by somebody, and is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from typing import Any

CONTENT_TYPE = "text/html; charset=utf-8"
HEADERS = (
    ("content-security-policy", "default-src 'none'; style-src 'unsafe-inline'"),
    ("referrer-policy", "no-referrer"),
)

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --dim: #888; --on: #2a8a4a; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem }
h1 { font-size: 1.4rem; margin: 0 }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; overflow-wrap: anywhere }
.dim { color: var(--dim) } .num { font-variant-numeric: tabular-nums }
.flow { display: grid; grid-template-columns: 1fr auto 10rem auto 1.4fr; gap: .6rem;
  align-items: center; border: 1px solid var(--line); border-radius: .6rem; padding: .8rem }
.col { display: grid; gap: .5rem; min-width: 0; grid-template-columns: minmax(0, 1fr) }
.box { background: var(--soft); border-radius: .4rem; padding: .4rem .7rem;
  overflow-wrap: anywhere }
.box b { font-weight: 600 } .arrow { color: var(--dim); font-size: 1.3rem }
.up::before { content: "\\25cf  "; color: var(--on) }
.down::before { content: "\\25cb  "; color: var(--dim) }
table { border-collapse: collapse; width: 100%; table-layout: fixed }
th, td { overflow-wrap: anywhere; text-align: left;
  padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line) }
th { color: var(--dim); font-weight: 500 }
@media (max-width: 45rem) { .flow { grid-template-columns: minmax(0, 1fr) }
  .arrow { rotate: 90deg; justify-self: center } }
"""


def topology_page(look: Mapping[str, Any]) -> bytes:
    """`look` is what /v1/topology answers."""
    body = [
        f"<h1>{_text(look['node'])}</h1>",
        f'<p class="dim">as this node sees it, over the last {look["window_s"]:.1f} s</p>',
    ]
    if not look["topics"]:
        body.append("<p>No topic is registered on this node.</p>")
    for topic in look["topics"]:
        body.append(_topic(topic))
    body.append(_ends("Brokers", look["brokers"]))
    body.append(_ends("Other nodes", look["peers"]))
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="refresh" content="5">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{_text(look['node'])}: topology</title><style>{STYLE}</style></head><body>"
        + "\n".join(body)
        + "</body></html>\n"
    )
    return page.encode()


def _topic(topic: Mapping[str, Any]) -> str:
    producers = [
        _box(
            _who(p["app"], p["group"]) if p["group"] else "without a group",
            _rate(p["rate_per_s"]),
        )
        for p in topic["produced_by"]
        # Who names no group is worth a line once somebody does so, or nobody names any.
        if p["group"] or p["rate_per_s"] or len(topic["produced_by"]) == 1
    ]
    brokers = [_box(f"<b>{_text(name)}</b>") for name in topic["brokers"]]
    consumers = [_consumer(c) for c in topic["consumed_by"]]
    columns = (
        producers or [_box('<span class="dim">no producer</span>')],
        brokers or [_box('<span class="dim">no broker has this topic</span>')],
        consumers or [_box('<span class="dim">no consumer</span>')],
    )
    arrow = '<div class="arrow">&rarr;</div>'
    cells = arrow.join(f'<div class="col">{"".join(column)}</div>' for column in columns)
    return f'<h2>{_text(topic["topic"])}</h2><div class="flow">{cells}</div>'


def _consumer(c: Mapping[str, Any]) -> str:
    notes = [
        _plural(c["connections"], "connection") if c["connections"] else "nobody connected",
        f"{c['in_flight']} of {c['credit']} unanswered",
    ]
    notes += [c["mode"]] if c["mode"] != "cluster" else []
    notes += ["by key"] if c["ordered"] else []
    notes += [f"only {c['filter']}"] if c["filter"] else []
    if c["forwarded_per_s"]:
        notes.append(f"{_number(c['forwarded_per_s'])}/s forwarded")
    if c["peers"]:
        notes.append("also on " + ", ".join(c["peers"]))
    said = " &middot; ".join(_text(note) for note in notes)
    return _box(_who(c["app"], c["group"]), _rate(c["rate_per_s"]), said)


def _ends(heading: str, ends: Iterable[Mapping[str, Any]]) -> str:
    rows = [
        f'<tr><td class="{"up" if e["up"] else "down"}">{_text(e["name"])}</td>'
        f"<td>{_text(e['address'] or 'not resolved')}</td>"
        f'<td class="num">{_rate(e["sent_per_s"])}</td></tr>'
        for e in ends
    ]
    if not rows:
        return ""
    return (
        f"<h2>{heading}</h2><table><tr><th>name</th><th>address</th><th>sent there</th></tr>"
        + "".join(rows)
        + "</table>"
    )


def _box(first: str, *lines: str) -> str:
    more = "".join(f'<div class="dim num">{line}</div>' for line in lines)
    return f'<div class="box">{first}{more}</div>'


def _who(app: str, group: str) -> str:
    return f'<b>{_text(group)}</b> <span class="dim">{_text(app)}</span>'


def _rate(per_s: float | None) -> str:
    return "counted with others" if per_s is None else f"{_number(per_s)}/s"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == 0 else f"{value:.1f}"


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def _text(value: object) -> str:
    return html.escape(str(value))
