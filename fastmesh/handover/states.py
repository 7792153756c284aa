"""The hand-over as one table, pure data: (side, state, event) -> (next state, actions).

Everything that decides who owns the connections stands in this file; the drivers (`giver.py`,
`taker.py`) only execute the actions, in order, and tell what came of them. docs/handover.md holds
the picture that `render()` makes of the table; the simulation runs the table as it stands.

Ownership, as the rows say it:

1.  The giver owns until it has sent COMMIT. Before that it may thaw: at once when the taker is
    proven dead, or cannot have the whole state yet; else only after `fencing`, that is, when the
    taker was killed by its pidfd and the pidfd was seen readable. A taker that slept
    through a thaw would otherwise wake up one day with a snapshot of connections that moved on.
2.  The taker owns by COMMIT; or when its snapshot is whole (END verified and loaded) and the giver
    is proven dead; or after it has fenced a giver that said nothing for HANDOVER_COMMIT_MS after
    READY. EOF is a hint, never a proof: it leads to states that wait for the pidfd.
3.  Where one cannot signal the other (`can_signal` is False: another PID namespace), nobody waits
    for a proof that cannot be had: the giver thaws at its deadline, and for exactly that reason the
    taker never adopts connections without COMMIT.

How a driver runs it:

-   It keeps one `Machine`, feeds it events, and executes the actions that `on()` gives, in order.
-   The actions of a move to another state are a job: when all of them have been executed it feeds
    `done`, when one failed `failed` (the rest is skipped). A move without actions leaves the job
    under way alone. One with actions drops it, without an event, if it is at an action of
    DROPPABLE; else that one is executed to its last action, tells nothing, and the new one waits
    its turn.
-   The actions of a move within a state (`keep`, `stop_later`, `kill_peer` again) are executed at
    once, beside the job, and feed nothing but `failed`.
-   A send that fails because the other end is closed (EPIPE, ECONNRESET) is `eof`, not `failed`.
-   SOCK_SEQPACKET records leave whole or not at all, so a send may be dropped while it waits for
    room. From the moment it has left, it is `done`, before anything else is looked at: the taker
    closes its end as soon as it reads COMMIT, and EOF must not be seen in `committing` then.
-   A record becomes an event (`wire.event_of`) after its content and its descriptors were checked;
    what fails the check is `violation`. REFUSE and ABORT are fed with their reason, and so is
    `refuse`.
-   The deadline is armed anew, for `deadline_ms`, whenever `clock` changes.
-   Events that are due at the same time are fed in this order: `done`, records that were received,
    `peer_dead`, `eof`, `failed`, `stop`, `deadline`. What a dead giver left in the socket is read
    before its death is told: END, or COMMIT, may be among it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

from fastmesh import limits

Side = Literal["giver", "taker"]
"""The old process and the new one."""

Event = Literal[
    # Records, after they were checked (wire.event_of).
    "HELLO",
    "ACK.move",
    "ACK.drain",
    "REFUSE",
    "LISTENERS",
    "LISTENERS.last",
    "PROCESS",
    "PREPARED",
    "STATE",
    "CONNS",
    "ACKED",
    "END",
    "READY",
    "COMMIT",
    "HANDED",
    "ABORT",
    # What `judge` made of HELLO.
    "move",
    "drain",
    "refuse",
    # Everything else.
    "start",  # the taker has parsed its configuration and may begin
    "nobody",  # connect found no socket, or nobody behind it
    "violation",  # no record, or one whose content or descriptors are wrong
    "done",  # the job that was given last has been executed
    "failed",  # a part of it failed
    "eof",  # the connection ended: a hint
    "peer_dead",  # the pidfd of the other process is readable: a proof
    "deadline",  # `deadline_ms` after `clock` changed
    "stop",  # SIGTERM
]

Action = Literal[
    # giver
    "judge",
    "hold",
    "send_ack",
    "send_refuse",
    "send_listeners",
    "close_doors",
    "send_process",
    "freeze",
    "save",
    "send_state",
    "send_end",
    "send_commit",
    "release",
    "thaw",
    "resume",
    "suspend",
    "settle",
    "stop_accepting",
    "send_handed",
    "let_go",
    "exit",
    # taker
    "connect",
    "send_hello",
    "keep",
    "prepare",
    "send_prepared",
    "load",
    "send_ready",
    "own",
    "own_listeners",
    "discard",
    "discard_all",
    "start_fresh",
    "start_fresh_with_listeners",
    "exit_refused",
    # both
    "kill_peer",
    "send_abort",
    "stop_later",
    "close",
    "report",
]

ACTIONS: Final[Mapping[Action, str]] = {
    "judge": "decide about HELLO (wire.judge) and feed `move`, `drain` or `refuse`, no `done`",
    "hold": "take no reload, no snapshot and no registration until `resume`",
    "send_ack": "ACK, with the own pidfd",
    "send_refuse": "REFUSE, with a code and the reason",
    "send_listeners": "LISTENERS, as many records as there have to be",
    "close_doors": "stop accepting on the admin and registration sockets: who comes waits there",
    "send_process": "PROCESS, the first copy of the process document, to compile with",
    "freeze": "stop the world in every engine thread; executed when all threads said `frozen`",
    "save": "settle what Python owes the engine, then have every thread write its world",
    "send_state": "STATE and CONNS of all threads, at most four records ahead of ACKED",
    "send_end": "END, with the final process document",
    "send_commit": "COMMIT: from here on nothing is this process's any more",
    "release": "close everything that was handed over, never shut it down; threads end",
    "thaw": "arm everything again, as if nothing had been",
    "resume": "undo hold, close_doors, stop_accepting and suspend; not in a process that was told"
    " to stop meanwhile",
    "suspend": "tell every broker and peer to send nothing more (drain, step 1)",
    "settle": "wait until the pushes in flight are answered (drain, step 2)",
    "stop_accepting": "stop accepting on the engine's listeners, without closing them",
    "send_handed": "HANDED: from here on the listeners are not this process's any more",
    "let_go": "close the listeners, let the clients go (drain, step 3)",
    "exit": "end this process, with success",
    "connect": "connect to handover.sock, open the pidfd of whom SO_PEERCRED names if that can be;"
    " feeds `nobody` when none is there",
    "send_hello": "HELLO, with the own pidfd",
    "keep": "keep what the record brought, after a look at what each descriptor is: a listening"
    " socket, the lock of this state directory, a sealed memfd, a connection; CONNS is answered"
    " with ACKED",
    "prepare": "bind what is new, compile with what was received (mode drain: what is on disk)",
    "send_prepared": "PREPARED",
    "load": "check END against what came, load every world",
    "send_ready": "READY",
    "own": "start the threads on what was loaded, accept, serve",
    "own_listeners": "start on the received listeners; the connections stay with the giver",
    "discard": "close every connection that was received, free what was loaded",
    "discard_all": "close all that was received: a listener kept would hold its port, and whoever"
    " waits in its queue",
    "start_fresh": "start as if nobody had been there; fails when somebody holds the lock of the"
    " state directory",
    "start_fresh_with_listeners": "start anew on the received listeners and the received lock",
    "exit_refused": "end this process, with failure",
    "kill_peer": "SIGKILL by pidfd",
    "send_abort": "ABORT with the reason, if there is room for it",
    "stop_later": "remember SIGTERM until this has ended, then obey it if anything is owned",
    "close": "close the connection",
    "report": "log and count how it ended and why, tell whoever asked for it",
}
"""What each means to a driver."""

DROPPABLE: Final[frozenset[Action]] = frozenset(
    {
        "judge",
        "send_ack",
        "send_listeners",
        "send_process",
        "freeze",
        "save",
        "send_state",
        "send_end",
        "send_commit",
        "suspend",
        "settle",
        "send_handed",
        "connect",
        "send_hello",
        "prepare",
        "send_prepared",
        "load",
        "send_ready",
    }
)
"""What may be dropped while it waits. Everything else ends by itself, and is never cut in half."""

RECORDS: Final[Mapping[Side, tuple[Event, ...]]] = {
    "giver": ("HELLO", "PREPARED", "ACKED", "READY", "ABORT"),
    "taker": (
        "ACK.move",
        "ACK.drain",
        "REFUSE",
        "LISTENERS",
        "LISTENERS.last",
        "PROCESS",
        "STATE",
        "CONNS",
        "END",
        "COMMIT",
        "HANDED",
        "ABORT",
    ),
}
"""What each side can receive; a record of the other direction is a `violation`."""

_OWN: Final[Mapping[Side, tuple[Event, ...]]] = {
    "giver": ("move", "drain", "refuse"),
    "taker": ("start", "nobody"),
}
_COMMON: Final[tuple[Event, ...]] = (
    "violation",
    "done",
    "failed",
    "eof",
    "peer_dead",
    "deadline",
    "stop",
)
EVENTS: Final[Mapping[Side, tuple[Event, ...]]] = {
    side: RECORDS[side] + _OWN[side] + _COMMON for side in get_args(Side)
}
"""All that can happen to each side: the table has a row for every one in every state."""


@dataclass(frozen=True, slots=True)
class Move:
    """What an event leads to."""

    next: str
    actions: tuple[Action, ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """A cell of the table."""

    move: Move
    alone: Move | None = None
    """Instead of `move` where one cannot signal the other (`can_signal` is False)."""
    own: bool = False
    """Said by the state itself; the rest is what a group of states has in common."""


@dataclass(frozen=True, slots=True)
class State:
    """A state, with what it is for a reader."""

    side: Side
    name: str
    what: str
    step: str
    """S1..S8 of the hand-over, "" outside of it."""
    deadline_ms: int | None
    """None: nothing is waited for (the end), or the job itself ends in time, as `what` says."""
    clock: str
    """States in a row with the same clock share one deadline; it runs from the first of them."""
    group: str
    """What events lead to that the state itself does not name (`GROUPS`)."""
    owns: bool
    """This side reads and writes the connections (when it is the giver: unless they are frozen)."""
    frozen: bool
    final: bool


Outcome = Move | tuple[Move, Move]
"""One move, or (the usual one, the one where nobody can be signalled)."""


def go(next: str, *actions: Action) -> Move:
    """`next` "" stands for the state itself."""
    return Move(next, actions)


_STATES: dict[tuple[Side, str], State] = {}
_TABLE: dict[tuple[Side, str, Event], Row] = {}


def when(outcome: Outcome, *events: Event) -> dict[Event, Outcome]:
    return dict.fromkeys(events, outcome)


@dataclass(slots=True)
class _Rows:
    """How the table is written: the path of a state, and what everything else leads to."""

    side: Side
    initial: str
    groups: dict[str, dict[Event, Outcome]] = field(default_factory=dict)

    def state(
        self,
        name: str,
        what: str,
        on: Mapping[Event, Outcome],
        *,
        otherwise: str,
        step: str = "",
        deadline_ms: int | None = None,
        clock: str = "",
        owns: bool = False,
        frozen: bool = False,
        final: bool = False,
    ) -> None:
        """`otherwise`: the group that says what events lead to which `on` does not name; what that
        does not name either changes nothing."""
        _STATES[self.side, name] = State(
            self.side, name, what, step, deadline_ms, clock or name, otherwise, owns, frozen, final
        )
        group = self.groups[otherwise]
        for event in EVENTS[self.side]:
            outcome = on.get(event) or group.get(event) or go(name)
            move, alone = outcome if isinstance(outcome, tuple) else (outcome, None)
            _TABLE[self.side, name, event] = Row(
                Move(move.next or name, move.actions),
                Move(alone.next or name, alone.actions) if alone is not None else None,
                own=event in on,
            )


# --- the giver ------------------------------------------------------------------------------------

_giver = _Rows("giver", "greeting")

_unexpected: tuple[Event, ...] = ("HELLO", "PREPARED", "ACKED", "READY", "violation")

# Before anything was promised: whoever is on the other side is sent away.
_giver.groups["early"] = {
    **when(
        go("ended", "send_refuse", "close", "report"), *_unexpected, "failed", "deadline", "stop"
    ),
    **when(go("ended", "close", "report"), "ABORT", "eof", "peer_dead"),
}

# Serving on, nothing frozen: the hand-over is called off, and what came with LISTENERS has to go.
_giver.groups["held"] = {
    **when(
        go("parting", "send_abort", "resume", "close", "report"),
        *_unexpected,
        "failed",
        "deadline",
        "stop",
    ),
    **when(go("parting", "resume", "close", "report"), "ABORT", "eof"),
    "peer_dead": go("ended", "resume", "close", "report"),
}

# Frozen, END has not left: the taker cannot own, so thawing needs no proof. Where it seems to hang,
# or went without a word, it is killed first all the same: it holds our descriptors.
_fence: Outcome = (
    go("fencing", "kill_peer"),
    go("parting", "send_abort", "thaw", "resume", "close", "report"),
)
_giver.groups["frozen"] = {
    **when(
        go("parting", "send_abort", "thaw", "resume", "close", "report"), *_unexpected, "failed"
    ),
    **when(_fence, "deadline", "eof"),
    "ABORT": go("parting", "thaw", "resume", "close", "report"),
    "peer_dead": go("ended", "thaw", "resume", "close", "report"),
    "stop": go("", "stop_later"),
}

# Frozen, END may have left: no thaw without proof. Not even the taker's own ABORT is one: it told
# its operator why before it said so, and dies of it.
_giver.groups["offered"] = (
    _giver.groups["frozen"]
    | when(_fence, *_unexpected, "failed", "deadline", "eof")
    | {
        "ABORT": (
            go("fencing", "kill_peer"),
            go("parting", "thaw", "resume", "close", "report"),
        )
    }
)

# Given away: there is no way back, and nothing that the other side says matters.
_giver.groups["given"] = {}
_giver.groups["over"] = {}

_giver.state(
    "greeting",
    "accepted; SO_PEERCRED is checked, HELLO is awaited",
    {"HELLO": go("judging", "judge")},
    otherwise="early",
    step="S1",
    deadline_ms=limits.HANDOVER_HELLO_MS,
    owns=True,
)
_giver.state(
    "judging",
    "deciding about HELLO: who asks, one at a time, versions, descriptors",
    {
        "move": go("offering", "hold", "send_ack", "send_listeners", "close_doors", "send_process"),
        "drain": go("offering_drain", "hold", "send_ack", "send_listeners"),
        "refuse": go("ended", "send_refuse", "close", "report"),
    },
    otherwise="early",
    step="S2",
    deadline_ms=limits.HANDOVER_HELLO_MS,
    owns=True,
)
_giver.state(
    "offering",
    "listeners and process document are sent, the taker prepares; serving on",
    {"PREPARED": go("freezing", "freeze"), "done": go("offering")},
    otherwise="held",
    step="S3",
    deadline_ms=limits.HANDOVER_PREPARE_MS,
    owns=True,
)
_giver.state(
    "freezing",
    "the world stops, thread by thread",
    {"done": go("saving", "save")},
    otherwise="frozen",
    step="S4",
    deadline_ms=limits.HANDOVER_FROZEN_MS,
    clock="frozen",
    owns=True,
    frozen=True,
)
_giver.state(
    "saving",
    "every thread writes its world to a memfd",
    {"done": go("sending", "send_state")},
    otherwise="frozen",
    step="S5",
    deadline_ms=limits.HANDOVER_FROZEN_MS,
    clock="frozen",
    owns=True,
    frozen=True,
)
_giver.state(
    "sending",
    "state and descriptors are sent, paced by ACKED",
    {"done": go("ending", "send_end"), "ACKED": go("sending")},
    otherwise="frozen",
    step="S5",
    deadline_ms=limits.HANDOVER_FROZEN_MS,
    clock="frozen",
    owns=True,
    frozen=True,
)
_giver.state(
    "ending",
    "END is sent; the taker verifies, loads and says READY",
    {"done": go("ending"), "ACKED": go("ending"), "READY": go("committing", "send_commit")},
    otherwise="offered",
    step="S6",
    deadline_ms=limits.HANDOVER_FROZEN_MS,
    clock="frozen",
    owns=True,
    frozen=True,
)
_giver.state(
    "committing",
    "COMMIT is being sent: the last moment in which this side may thaw",
    # An ACKED that waited for room may come late.
    {"done": go("releasing", "release", "close", "report"), "ACKED": go("committing")},
    otherwise="offered",
    step="S7",
    deadline_ms=limits.HANDOVER_FROZEN_MS,
    clock="frozen",
    owns=True,
    frozen=True,
)
_giver.state(
    "fencing",
    "the taker was killed; frozen until its pidfd proves it",
    {
        "peer_dead": go("ended", "thaw", "resume", "close", "report"),
        "deadline": go("fencing", "kill_peer"),
        "stop": go("fencing", "stop_later"),
    },
    otherwise="over",
    step="S7",
    deadline_ms=limits.HANDOVER_DEATH_MS,
    owns=True,
    frozen=True,
)
_giver.state(
    "releasing",
    "COMMIT has left: closing everything, threads end",
    {"done": go("gone", "exit"), "failed": go("gone", "exit"), "deadline": go("gone", "exit")},
    otherwise="given",
    step="S8",
    deadline_ms=limits.STOP_JOIN_MS,
)
_giver.state(
    "parting",
    "serving on; a taker that does not go by itself is killed, because it holds our descriptors",
    {"peer_dead": go("ended"), "deadline": (go("ended", "kill_peer"), go("ended"))},
    otherwise="over",
    deadline_ms=limits.HANDOVER_DEATH_MS,
    owns=True,
)
_giver.state(
    "offering_drain",
    "versions too far apart: listeners are sent, the taker prepares; serving on",
    {"PREPARED": go("suspending", "suspend"), "done": go("offering_drain")},
    otherwise="held",
    step="S3",
    deadline_ms=limits.HANDOVER_PREPARE_MS,
    owns=True,
)
_giver.state(
    "suspending",
    "drain 1: brokers are told to push nothing more",
    {"done": go("settling", "settle")},
    otherwise="held",
    deadline_ms=limits.HANDOVER_SUSPEND_MS,
    owns=True,
)
_giver.state(
    "settling",
    "drain 2: pushes in flight are answered; what is not in time comes again elsewhere",
    {
        "done": go("handing", "close_doors", "stop_accepting", "send_handed"),
        "deadline": go("handing", "close_doors", "stop_accepting", "send_handed"),
    },
    otherwise="held",
    deadline_ms=limits.HANDOVER_SETTLE_MS,
    owns=True,
)
_giver.state(
    "handing",
    "HANDED is being sent: the last moment in which the listeners are this side's",
    {"done": go("letting_go", "close", "let_go")},
    otherwise="held",
    deadline_ms=limits.HANDOVER_HELLO_MS,
    owns=True,
)
_giver.state(
    "letting_go",
    "drain 3: the listeners are the taker's, clients are let go",
    {
        "done": go("gone", "report", "exit"),
        "failed": go("gone", "report", "exit"),
        "deadline": go("gone", "report", "exit"),
    },
    otherwise="given",
    deadline_ms=limits.CONFIGURABLE["stop_timeout_ms"].high,
    owns=True,
)
_giver.state("ended", "no hand-over; serving on", {}, otherwise="over", owns=True, final=True)
_giver.state("gone", "handed over; this process ends", {}, otherwise="over", final=True)


# --- the taker ------------------------------------------------------------------------------------

_taker = _Rows("taker", "initial")

_unexpected = (*(e for e in RECORDS["taker"] if e not in ("REFUSE", "ABORT")), "violation")

# Nothing of the giver's is held yet: it serves on, this process goes.
_taker.groups["early"] = {
    **when(
        go("refused", "report", "send_abort", "close", "exit_refused"),
        *_unexpected,
        "failed",
        "deadline",
        "stop",
    ),
    **when(go("refused", "report", "close", "exit_refused"), "REFUSE", "ABORT"),
}

# Listeners are whole, the state is not: if the giver is dead, the listeners are saved.
_fresh: Move = go("starting", "discard", "close", "start_fresh_with_listeners", "report")
_taker.groups["listed"] = {
    **when(
        go("refused", "report", "send_abort", "discard", "close", "exit_refused"),
        *_unexpected,
        "failed",
        "deadline",
        "stop",
    ),
    **when(go("refused", "report", "discard", "close", "exit_refused"), "REFUSE", "ABORT"),
    "eof": go("doubting_listed", "close"),
    "peer_dead": _fresh,
}
_taker.groups["over"] = {}

_taker.state(
    "initial",
    "configuration parsed, limits checked; not connected",
    {
        "start": go("connecting", "connect"),
        "stop": go("refused", "report", "exit_refused"),
    },
    otherwise="over",
    step="S1",
)
_taker.state(
    "connecting",
    "connecting; SO_PEERCRED and the directory of the socket are checked",
    {
        "done": go("greeting", "send_hello"),
        "nobody": go("starting", "start_fresh", "report"),
        "failed": go("refused", "report", "exit_refused"),
        "violation": go("refused", "report", "exit_refused"),
        "deadline": go("refused", "report", "exit_refused"),
        "stop": go("refused", "report", "exit_refused"),
    },
    otherwise="over",
    step="S1",
    deadline_ms=limits.HANDOVER_HELLO_MS,
)
_taker.state(
    "greeting",
    "HELLO is sent, ACK or REFUSE is awaited",
    {
        "done": go("greeting"),
        "ACK.move": go("listing"),
        "ACK.drain": go("listing_drain"),
        "eof": go("doubting", "close"),
        "peer_dead": go("starting", "close", "discard_all", "start_fresh", "report"),
    },
    otherwise="early",
    step="S2",
    deadline_ms=limits.HANDOVER_ANSWER_MS,
)
_taker.state(
    "listing",
    "listeners are received",
    {
        "LISTENERS": go("listing", "keep"),
        "LISTENERS.last": go("listed", "keep"),
        "done": go("listing"),
        "eof": go("doubting", "close"),
        "peer_dead": go("starting", "close", "discard_all", "start_fresh", "report"),
    },
    otherwise="early",
    step="S3",
    deadline_ms=limits.HANDOVER_ANSWER_MS,
)
_taker.state(
    "listed",
    "listeners are whole, the process document is awaited",
    {"done": go("listed"), "PROCESS": go("preparing", "keep", "prepare")},
    otherwise="listed",
    step="S3",
    deadline_ms=limits.HANDOVER_ANSWER_MS,
)
_taker.state(
    "preparing",
    "binding what is new, compiling",
    {"done": go("receiving", "send_prepared")},
    otherwise="listed",
    step="S3",
    deadline_ms=limits.HANDOVER_PREPARE_MS,
)
_taker.state(
    "receiving",
    "PREPARED is sent, state and descriptors are received",
    {
        "done": go("receiving"),
        "STATE": go("receiving", "keep"),
        "CONNS": go("receiving", "keep"),
        "END": go("loading", "keep", "load"),
    },
    otherwise="listed",
    step="S5",
    deadline_ms=limits.HANDOVER_STATE_MS,
)
_taker.state(
    "loading",
    "END is here: everything is verified and loaded",
    {
        "done": go("ready", "send_ready"),
        "eof": go("loading_cut"),
        "peer_dead": (go("loading_alone"), _fresh),
    },
    otherwise="listed",
    step="S6",
    deadline_ms=limits.HANDOVER_LOAD_MS,
    clock="loading",
)
_taker.state(
    "loading_cut",
    "loading goes on, the connection has ended: dead, or about to kill this process?",
    {
        "done": go("orphaned", "close"),
        "eof": go("loading_cut"),
        "peer_dead": (go("loading_alone"), _fresh),
        "failed": go("doubting_listed", "discard", "close"),
    },
    otherwise="listed",
    step="S6",
    deadline_ms=limits.HANDOVER_LOAD_MS,
    clock="loading",
)
_taker.state(
    "loading_alone",
    "loading goes on, the giver is dead: what loads is this side's",
    {
        "done": go("owning", "close", "own", "report"),
        "failed": _fresh,
        "deadline": _fresh,
        "stop": go("loading_alone", "stop_later"),
    },
    otherwise="over",
    step="S6",
    deadline_ms=limits.HANDOVER_LOAD_MS,
)
_taker.state(
    "ready",
    "READY is sent, COMMIT is awaited",
    {
        "done": go("ready"),
        "COMMIT": go("owning", "close", "own", "report"),
        "eof": (go("orphaned", "close"), go("doubting_listed", "discard", "close")),
        "peer_dead": (go("owning", "close", "own", "report"), _fresh),
        "deadline": (
            go("fencing", "kill_peer"),
            go("refused", "report", "discard", "close", "exit_refused"),
        ),
        # COMMIT may be on its way: to go now could leave nobody.
        "stop": go("ready", "stop_later"),
    },
    otherwise="listed",
    step="S7",
    deadline_ms=limits.HANDOVER_COMMIT_MS,
    clock="ready",
)
_taker.state(
    "orphaned",
    "the snapshot is whole, the connection has ended: the pidfd will tell",
    {
        "peer_dead": (
            go("owning", "own", "report"),
            go("starting", "discard", "start_fresh_with_listeners", "report"),
        ),
        "deadline": (
            go("fencing", "kill_peer"),
            go("refused", "report", "discard", "exit_refused"),
        ),
        "stop": go("orphaned", "stop_later"),
    },
    otherwise="over",
    step="S7",
    deadline_ms=limits.HANDOVER_COMMIT_MS,
    clock="ready",
)
_taker.state(
    "fencing",
    "the giver said nothing for too long and was killed; not this side's until the pidfd proves it",
    {
        "COMMIT": go("owning", "close", "own", "report"),
        "ABORT": go("doubting_listed", "discard", "close"),
        "peer_dead": go("owning", "close", "own", "report"),
        "failed": go("refused", "report", "discard", "close", "exit_refused"),
        "deadline": go("fencing", "kill_peer"),
        "stop": go("fencing", "stop_later"),
    },
    otherwise="over",
    step="S7",
    deadline_ms=limits.HANDOVER_DEATH_MS,
)
_taker.state(
    "owning",
    "everything is this side's: threads start; no deadline, for there is nobody to go back to",
    {
        "done": go("owner"),
        "failed": go("refused", "report", "exit_refused"),
        "stop": go("owning", "stop_later"),
    },
    otherwise="over",
    step="S8",
    owns=True,
)
_taker.state(
    "doubting",
    "the connection ended before the listeners were whole: dead, or alive and unwilling?",
    {
        "peer_dead": go("starting", "discard_all", "start_fresh", "report"),
        # Without a pidfd the lock tells: it is free when the giver is dead, and only then.
        "deadline": go("starting", "discard_all", "start_fresh", "report"),
        "stop": go("refused", "report", "exit_refused"),
    },
    otherwise="over",
    step="S3",
    deadline_ms=limits.HANDOVER_DEATH_MS,
)
_taker.state(
    "doubting_listed",
    "the connection ended after the listeners were whole, and the state is not to be had",
    {
        "peer_dead": go("starting", "discard", "start_fresh_with_listeners", "report"),
        "deadline": go("refused", "report", "discard", "exit_refused"),
        "stop": go("refused", "report", "discard", "exit_refused"),
    },
    otherwise="over",
    step="S5",
    deadline_ms=limits.HANDOVER_DEATH_MS,
)
_taker.state(
    "listing_drain",
    "versions too far apart: listeners are received",
    {
        "LISTENERS": go("listing_drain", "keep"),
        "LISTENERS.last": go("preparing_drain", "keep", "prepare"),
        "done": go("listing_drain"),
        "eof": go("doubting", "close"),
        "peer_dead": go("starting", "close", "discard_all", "start_fresh", "report"),
    },
    otherwise="early",
    step="S3",
    deadline_ms=limits.HANDOVER_ANSWER_MS,
)
_taker.state(
    "preparing_drain",
    "binding what is new, compiling",
    {"done": go("prepared_drain", "send_prepared")},
    otherwise="listed",
    step="S3",
    deadline_ms=limits.HANDOVER_PREPARE_MS,
)
_taker.state(
    "prepared_drain",
    "PREPARED is sent; the giver suspends brokers and settles pushes",
    {
        "done": go("prepared_drain"),
        "HANDED": go("owning_drain", "close", "own_listeners", "report"),
    },
    otherwise="listed",
    deadline_ms=limits.HANDOVER_HANDED_MS,
)
_taker.state(
    "owning_drain",
    "the listeners are this side's: starting; no deadline, as in owning",
    {
        "done": go("owner"),
        "failed": go("refused", "report", "exit_refused"),
        "stop": go("owning_drain", "stop_later"),
    },
    otherwise="over",
    owns=True,
)
_taker.state(
    "starting",
    "nothing is to be had of the giver, which is dead or was never there: starting anew",
    {
        "done": go("fresh"),
        "failed": go("refused", "report", "exit_refused"),
        "stop": go("starting", "stop_later"),
    },
    otherwise="over",
    owns=True,
)
_taker.state("owner", "serving", {}, otherwise="over", owns=True, final=True)
_taker.state("fresh", "serving, started anew", {}, otherwise="over", step="", owns=True, final=True)
_taker.state("refused", "no hand-over; this process ends", {}, otherwise="over", final=True)

TABLE: Final[Mapping[tuple[Side, str, Event], Row]] = _TABLE
STATES: Final[Mapping[tuple[Side, str], State]] = _STATES
GROUPS: Final[Mapping[tuple[Side, str], Mapping[Event, Outcome]]] = {
    (rows.side, name): group for rows in (_giver, _taker) for name, group in rows.groups.items()
}
"""What states have in common. What neither a state nor its group names changes nothing."""
INITIAL: Final[Mapping[Side, str]] = {"giver": _giver.initial, "taker": _taker.initial}

POINTS: Final[Mapping[Side, Mapping[str, str]]] = {
    "giver": {
        "judge": "S1",
        "send_ack": "S2",
        "send_listeners": "S3",
        "freeze": "S4",
        "send_state": "S5",
        "send_end": "S6",
        "send_commit": "S7",
        "release": "S8",
    },
    "taker": {
        "connect": "S1",
        "send_hello": "S2",
        "LISTENERS": "S3",
        "send_prepared": "S4",
        "STATE": "S5",
        "CONNS": "S5",
        "load": "S6",
        "send_ready": "S7",
        "own": "S8",
    },
}
"""Fault points (faults.py): just before that action is executed, or that record is looked at.
S3 and S5 are struck once per record, counted from 1."""


_ODD: Final[frozenset[Event]] = frozenset(
    {"violation", "failed", "eof", "peer_dead", "deadline", "stop", "ABORT", "REFUSE"}
)


class Machine:
    """One side of one hand-over. It has no clock and does nothing but look into the table."""

    __slots__ = ("_table", "can_signal", "clock", "reason", "side", "state")

    def __init__(
        self,
        side: Side,
        *,
        can_signal: bool = True,
        table: Mapping[tuple[Side, str, Event], Row] = TABLE,
    ) -> None:
        self.side: Final = side
        self.state = INITIAL[side]
        self.can_signal = can_signal
        """Giver: it can signal the taker, and says so in ACK. Taker: both can signal each other."""
        self.clock = 0
        """Counts the deadlines that began."""
        self.reason = ""
        """Why it did not go the straight way: for ABORT, REFUSE and the report."""
        self._table = table

    @property
    def here(self) -> State:
        return STATES[self.side, self.state]

    @property
    def deadline_ms(self) -> int | None:
        """How long after `clock` changed the event `deadline` is due."""
        return self.here.deadline_ms

    @property
    def final(self) -> bool:
        return self.here.final

    def on(self, event: Event, reason: str = "") -> tuple[Action, ...]:
        """The actions that this event asks for. `reason` says more about it, for people.

        A record that the other side never sends is a `violation`; so is any word unknown here.
        """
        if event not in EVENTS[self.side]:
            event, reason = "violation", reason or f"{event} is not for the {self.side}"
        row = self._table[self.side, self.state, event]
        move = row.move if self.can_signal or row.alone is None else row.alone
        before = self.here
        if not self.reason and move.actions and (reason or event in _ODD or not row.own):
            self.reason = reason or self._why(event, before)
        self.state = move.next
        if self.here.clock != before.clock or (event == "deadline" and self.state == before.name):
            self.clock += 1
        return move.actions

    def _why(self, event: Event, here: State) -> str:
        said = {
            "deadline": f"nothing happened for {here.deadline_ms} ms",
            "eof": "the other process closed the connection",
            "peer_dead": "the other process ended",
            "stop": "asked to stop",
            "failed": "a step failed",
            "ABORT": "the other process called it off",
            "violation": "the other process broke the protocol",
        }.get(event, f"{event} was not expected")
        return f"{said} ({here.step or 'drain'}, {here.name}: {here.what})"
