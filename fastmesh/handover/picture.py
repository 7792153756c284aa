"""The table as a page shows it: a picture of both sides, and every row.

`python -m fastmesh.handover.picture docs/handover.md` puts both between the markers of that page; a
test compares them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from fastmesh.handover.states import (
    EVENTS,
    GROUPS,
    INITIAL,
    RECORDS,
    STATES,
    TABLE,
    Event,
    Move,
    Outcome,
    Side,
    State,
)

BEGIN: Final = (
    "<!-- made from fastmesh/handover/states.py: `python -m fastmesh.handover.picture` -->"
)
END: Final = "<!-- end of what is made -->"

NAMES: Final[Mapping[tuple[Side, str], str]] = {
    ("giver", "early"): "nothing promised yet",
    ("giver", "held"): "serving on, the taker holds listeners",
    ("giver", "frozen"): "frozen, END has not left",
    ("giver", "offered"): "frozen, END may have left",
    ("giver", "given"): "given away",
    ("giver", "over"): "over",
    ("taker", "early"): "nothing received yet",
    ("taker", "listed"): "listeners whole",
    ("taker", "over"): "only what is named",
}
"""Of the groups, for people."""


def render() -> str:
    """Markdown: for each side a Mermaid picture, its states, its rows."""
    parts: list[str] = []
    titles: dict[Side, str] = {"giver": "The giver (old)", "taker": "The taker (new)"}
    for side, title in titles.items():
        parts += [f"### {title}", "", *_picture(side), "", *_states(side), "", *_rows(side), ""]
    return "\n".join(parts).rstrip()


def _of(side: Side) -> list[State]:
    return [state for (whose, _), state in STATES.items() if whose == side]


def _picture(side: Side) -> Iterator[str]:
    yield "```mermaid"
    yield "stateDiagram-v2"
    yield f"    [*] --> {INITIAL[side]}"
    groups: dict[str, list[State]] = {}
    for state in _of(side):
        groups.setdefault(state.group, []).append(state)
    boxed = [name for name, states in groups.items() if GROUPS[side, name] and len(states) > 1]
    for name in boxed:
        yield f'    state "{NAMES[side, name]}" as {name}_ {{'
        yield from (f"        {state.name}" for state in groups[name])
        yield "    }"
    for state in _of(side):
        own = {
            event: TABLE[side, state.name, event].move
            for event in EVENTS[side]
            if TABLE[side, state.name, event].own
        }
        if state.group not in boxed:
            own |= {e: _usual(o) for e, o in GROUPS[side, state.group].items() if e not in own}
        yield from _edges(state.name, own)
        if state.final:
            yield f"    {state.name} --> [*]"
    for name in boxed:
        yield from _edges(f"{name}_", {e: _usual(o) for e, o in GROUPS[side, name].items()})
    yield "```"


def _edges(start: str, moves: Mapping[Event, Move]) -> Iterator[str]:
    by_target: dict[str, list[Event]] = {}
    for event, move in moves.items():
        if move.next not in ("", start):
            by_target.setdefault(move.next, []).append(event)
    for target, events in by_target.items():
        yield f"    {start} --> {target}: {_words(events)}"


def _words(events: Iterable[Event]) -> str:
    """Unexpected records are always there together, under the name of what they are."""
    found = list(events)
    if "violation" in found:
        every = {event for records in RECORDS.values() for event in records} - {"ABORT", "REFUSE"}
        found = [event for event in found if event not in every]
    return ", ".join(found)


def _usual(outcome: Outcome) -> Move:
    return outcome[0] if isinstance(outcome, tuple) else outcome


def _states(side: Side) -> Iterator[str]:
    yield "| state | step | deadline | what | otherwise |"
    yield "|---|---|---|---|---|"
    for state in _of(side):
        deadline = "" if state.deadline_ms is None else f"{state.deadline_ms} ms"
        if state.clock != state.name:
            deadline += f" ({state.clock})"
        group = NAMES[side, state.group] if GROUPS[side, state.group] else ""
        yield f"| `{state.name}` | {state.step} | {deadline} | {state.what} | {group} |"


def _rows(side: Side) -> Iterator[str]:
    yield "| in | on | to | actions |"
    yield "|---|---|---|---|"
    for state in _of(side):
        rows = {event: TABLE[side, state.name, event] for event in EVENTS[side]}
        yield from _lines(
            f"`{state.name}`",
            {
                event: row.move if row.alone is None else (row.move, row.alone)
                for event, row in rows.items()
                if row.own
            },
            state.name,
        )
    for (whose, name), group in GROUPS.items():
        if whose == side:
            yield from _lines(f"*{NAMES[side, name]}*", group, "")


def _lines(where: str, outcomes: Mapping[Event, Outcome], here: str) -> Iterator[str]:
    merged: dict[Outcome, list[Event]] = {}
    for event, outcome in outcomes.items():
        if _usual(outcome).actions or _usual(outcome).next not in ("", here):
            merged.setdefault(outcome, []).append(event)
    for outcome, events in merged.items():
        moves = outcome if isinstance(outcome, tuple) else (outcome,)
        for number, move in enumerate(moves):
            words = _words(events) + (" *(cannot signal)*" if number else "")
            target = f"`{move.next}`" if move.next not in ("", here) else "stays"
            yield f"| {where} | {words} | {target} | {', '.join(move.actions)} |"


def put_into(page: str) -> str:
    """The page with what stands between its markers made anew. Raises ValueError without them."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n\n{render()}\n\n{END}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(put_into(path.read_text()))
