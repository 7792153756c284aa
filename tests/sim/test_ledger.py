"""The oracle is worth what it catches: every class is planted into an honest history and must be
named.

`make sim SEED=n` repeats one random history; without a seed one is drawn and printed on failure.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest

from tests.sim.ledger import CLASSES, Ledger, Operation, decode, encode, new_operation

CLIENTS = 3
OPS = 40


def seed() -> int:
    return int(os.environ.get("SEED") or random.SystemRandom().randrange(1 << 32))


class History:
    """An honest run of some clients, as a list of facts that a plant may tamper with before
    replay."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.ops = [
            (new_operation(client, 0, seq), seq + 1, rng.randrange(44, 600))
            for client in range(CLIENTS)
            for seq in range(OPS)
        ]
        self.executions = [encode(op, size) for op, _, size in self.ops]
        self.outcomes = [(op.client, 0, rid, 0, encode(op, size)) for op, rid, size in self.ops]
        rng.shuffle(self.outcomes)

    def replay(self, *, ordered: bool = False) -> Ledger:
        ledger = Ledger(ordered=ordered)
        for op, request_id, _ in self.ops:
            ledger.sent(op, request_id)
        for body in self.executions:
            ledger.executed(body)
        for outcome in self.outcomes:
            ledger.outcome(*outcome)
        return ledger


def drop_one(history: History) -> None:
    history.outcomes.pop(history.rng.randrange(len(history.outcomes)))


def answer_twice(history: History) -> None:
    history.outcomes.append(history.rng.choice(history.outcomes))


def execute_twice(history: History) -> None:
    history.executions.append(history.rng.choice(history.executions))


def swap_clients(history: History) -> None:
    """Two answers change places between connections, as a wrong slot would do."""
    a = next(i for i, o in enumerate(history.outcomes) if o[0] == 0)
    b = next(i for i, o in enumerate(history.outcomes) if o[0] == 1)
    one, two = history.outcomes[a], history.outcomes[b]
    history.outcomes[a] = (*one[:4], two[4])
    history.outcomes[b] = (*two[:4], one[4])


def swap_ids(history: History) -> None:
    """Two answers of one connection change places."""
    a, b = [i for i, o in enumerate(history.outcomes) if o[0] == 2][:2]
    one, two = history.outcomes[a], history.outcomes[b]
    history.outcomes[a] = (*one[:4], two[4])
    history.outcomes[b] = (*two[:4], one[4])


def flip_byte(history: History) -> None:
    at = history.rng.randrange(len(history.outcomes))
    client, epoch, rid, status, body = history.outcomes[at]
    damaged = bytearray(body)
    damaged[history.rng.randrange(len(damaged))] ^= 1 << history.rng.randrange(8)
    history.outcomes[at] = (client, epoch, rid, status, bytes(damaged))


def flip_byte_upstream(history: History) -> None:
    at = history.rng.randrange(len(history.executions))
    damaged = bytearray(history.executions[at])
    damaged[history.rng.randrange(len(damaged))] ^= 1
    history.executions[at] = bytes(damaged)


def invent_answer(history: History) -> None:
    stranger = new_operation(0, 0, 10_000)
    history.outcomes.append((0, 0, 10_001, 0, encode(stranger)))


def invent_error(history: History) -> None:
    history.outcomes.append((0, 0, 10_001, 16, b""))


def invent_execution(history: History) -> None:
    history.executions.append(encode(new_operation(0, 0, 10_000)))


def error_after_execution(history: History) -> None:
    client, epoch, rid, _, _ = history.outcomes[0]
    history.outcomes[0] = (client, epoch, rid, 16, b"")


def overload_after_execution(history: History) -> None:
    """ "Overload" promises that nothing was executed; here it was."""
    client, epoch, rid, _, _ = history.outcomes[0]
    history.outcomes[0] = (client, epoch, rid, 4, b"")


def overtake(history: History) -> None:
    history.executions[3], history.executions[4] = history.executions[4], history.executions[3]


PLANTS: list[tuple[Callable[[History], None], str]] = [
    (drop_one, "lost"),
    (answer_twice, "duplicated"),
    (execute_twice, "duplicated"),
    (swap_clients, "misrouted"),
    (swap_ids, "misrouted"),
    (flip_byte, "torn"),
    (flip_byte_upstream, "torn"),
    (invent_answer, "unexpected"),
    (invent_error, "unexpected"),
    (invent_execution, "unexpected"),
    (error_after_execution, "ambiguous"),
    (overload_after_execution, "ambiguous"),
    (overtake, "reordered"),
]


def test_every_class_has_a_plant() -> None:
    assert {name for _, name in PLANTS} == set(CLASSES)


def test_honest_history_is_clean() -> None:
    number = seed()
    verdict = (
        History(random.Random(number)).replay(ordered=True).judge().check(sent_min=CLIENTS * OPS)
    )
    assert verdict.answered == CLIENTS * OPS, f"SEED={number}"


@pytest.mark.parametrize(
    ("plant", "name"), PLANTS, ids=lambda value: getattr(value, "__name__", "")
)
def test_planted_violation_is_named(plant: Callable[[History], None], name: str) -> None:
    number = seed()
    history = History(random.Random(number))
    plant(history)
    verdict = history.replay(ordered=True).judge()
    assert verdict.counts[name] >= 1, f"SEED={number}: {verdict}"
    with pytest.raises(AssertionError, match=name):
        verdict.check()


def test_errors_are_outcomes() -> None:
    """Explicit errors settle an operation; only those after which it may have run are ambiguous."""
    ledger = Ledger()
    for seq, status in enumerate((4, 6, 7, 16)):
        ledger.sent(new_operation(1, 0, seq), seq + 1)
        ledger.outcome(1, 0, seq + 1, status, b"")
    verdict = ledger.judge().check(ambiguous_max=2)
    assert verdict.counts["ambiguous"] == 2
    assert verdict.errors == {4: 1, 6: 1, 7: 1, 16: 1}


def test_two_requests_of_one_id_each_need_their_own_outcome() -> None:
    ledger = Ledger()
    first, second = new_operation(1, 0, 0), new_operation(1, 0, 1)
    ledger.sent(first, 7)
    ledger.sent(second, 7)
    ledger.outcome(1, 0, 7, 0, encode(second))
    assert ledger.unsettled() == 1
    assert ledger.judge().counts["lost"] == 1
    ledger.outcome(1, 0, 7, 0, encode(first))
    assert ledger.judge().check().answered == 2


@pytest.mark.parametrize(
    ("by_client", "reset_is", "name"),
    [(True, "lost", None), (False, "lost", "lost"), (False, "ambiguous", "ambiguous")],
)
def test_ended_connection(by_client: bool, reset_is: str, name: str | None) -> None:
    ledger = Ledger()
    ledger.sent(new_operation(1, 0, 0), 1)
    ledger.sent(new_operation(2, 0, 0), 1)
    ledger.outcome(2, 0, 1, 6, b"")
    ledger.ended(1, 0, by_client=by_client)
    verdict = ledger.judge(reset_is=reset_is)
    assert verdict.gone == (1 if by_client else 0)
    assert [n for n in CLASSES if verdict.counts[n]] == ([name] if name else [])


def test_a_moved_boundary_is_torn() -> None:
    ledger = Ledger()
    ledger.sent(new_operation(1, 0, 0), 1)
    ledger.garbage(1, 0, "malformed")
    assert ledger.judge().counts["torn"] == 1


def test_oneways_are_counted_at_the_upstream() -> None:
    ledger = Ledger()
    ops = [new_operation(1, 0, seq) for seq in range(3)]
    for op in ops:
        ledger.sent(op, 1, oneway=True)
    ledger.executed(encode(ops[0]))
    verdict = ledger.judge().check()
    assert (verdict.oneway_sent, verdict.oneway_dropped, verdict.counts["lost"]) == (3, 2, 0)
    ledger.executed(encode(ops[0]))
    assert ledger.judge().counts["duplicated"] == 1


def test_idempotent_operations_may_run_twice() -> None:
    ledger = Ledger()
    op = new_operation(1, 0, 0)
    ledger.sent(op, 1, idempotent=True)
    ledger.executed(encode(op))
    ledger.executed(encode(op))
    ledger.outcome(1, 0, 1, 0, encode(op))
    ledger.judge().check()


def test_nothing_happened_is_void() -> None:
    with pytest.raises(AssertionError, match="void"):
        Ledger().judge().check()


@pytest.mark.parametrize("size", [0, 40, 41, 100, 4096])
def test_body_round_trip(size: int) -> None:
    op = Operation(1, 2, 3, bytes(range(16)))
    body = encode(op, size)
    assert len(body) == max(size, 40)
    assert decode(body) == op
    assert decode(body[:-1]) is None
    assert decode(body + b"\0") is None
