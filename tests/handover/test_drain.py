"""The three steps of a drain, scripted, in virtual time: what is said in which order, how long each
step waits, what comes of it when nobody answers, and what else may be asked meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any

import pytest

from fastmesh import limits
from fastmesh.errors import EngineError, StateError
from fastmesh.handover.drain import IDLE, Drain, Left, Times
from tests.conftest import LogLines
from tests.virtual_time import run_virtually

TIMES = Times(suspend_ms=1000, answers_ms=3000, clients_ms=1000)
STOP_S = 5.0
QUIET_S = limits.DRAIN_QUIET_S
SLACK_S = 2 * limits.DRAIN_LOOK_LATER_S
"""A look more or less."""


class Script:
    """Brokers, consumers and clients that do what a test says, when it says so."""

    def __init__(self, log: LogLines, *, mesh: bool = True) -> None:
        self.lines = log
        self.has_mesh = mesh
        self.done: list[str] = []
        self.brokers: dict[str, str] = {}
        """Those that have not agreed -> "" (they may yet) or why not."""
        self.groups: Counter[str] = Counter()
        self.pushed = 0
        self.connections: Counter[str] = Counter()
        self.closed = False
        self.engine_failure = ""
        self.refuses_commands = 0
        self.hangs = False
        self.totals: Counter[tuple[str, str]] = Counter()
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()

    # --- what a test says -------------------------------------------------------------------------

    def at(self, after_s: float, what: Callable[[], object]) -> None:
        self._loop.call_later(after_s, what)

    def push(self, group: str = "g1", answered_after_s: float | None = None) -> None:
        """A broker pushes."""
        self.pushed += 1
        if self.closed:
            self.done.append("refused")
            return
        self.groups[group] += 1
        if answered_after_s is not None:
            self.at(answered_after_s, lambda: self.groups.subtract([group]))

    def agree(self, name: str) -> None:
        self.brokers.pop(name, None)

    @property
    def took_s(self) -> float:
        return self._loop.time() - self._began

    def drain(self, **options: Any) -> Drain:
        times = options.pop("times", TIMES)
        return Drain(self, self.lines.log, times, totals=self.totals, **options)

    # --- Hands ------------------------------------------------------------------------------------

    def suspend(self) -> None:
        self.done.append("suspend")

    def resume(self) -> None:
        self.closed = False
        self.done.append("resume")

    def suspending(self) -> Sequence[str]:
        return sorted(name for name, why in self.brokers.items() if not why)

    def pushing(self) -> Mapping[str, str]:
        return {name: why or "no answer yet" for name, why in sorted(self.brokers.items())}

    def close_groups(self) -> None:
        if not self.closed:
            self.done.append("close groups")
        self.closed = True

    async def groups_closed(self) -> None:
        await asyncio.sleep(0.001)
        if self.engine_failure:
            raise EngineError(self.engine_failure)

    def let_go(self, *, keep_paths: bool) -> bool:
        if self.refuses_commands:
            self.refuses_commands -= 1
            return False
        what = "let go, paths stay" if keep_paths else "let go"
        if what not in self.done:
            self.done.append(what)
        return True

    def gone(self) -> bool:
        return not +self.connections

    async def look(self) -> Left:
        await asyncio.sleep(3600 if self.hangs else 0)
        if self.engine_failure:
            raise EngineError(self.engine_failure)
        return Left(+self.groups, self.pushed, 0, +self.connections)


def virtually(test: Callable[[Script], Coroutine[Any, Any, None]]) -> Callable[[LogLines], None]:
    """The test over a script, on a loop whose clock jumps."""

    def run(log_lines: LogLines) -> None:
        async def main() -> None:
            script = Script(log_lines)
            await test(script)
            left = asyncio.all_tasks() - {asyncio.current_task()}
            assert not left, left

        run_virtually(main())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


async def reached(drain: Drain, step: str) -> None:
    for _ in range(100_000):
        if drain.step == step:
            return
        await asyncio.sleep(0.001)
    raise AssertionError(f"not in step {step}: {drain.status()}")


def outcomes(drain: Drain) -> dict[str, str]:
    return {found["step"]: found["outcome"] for found in drain.status()["steps"]}


def near(found: float, wanted: float) -> bool:
    return wanted - 1e-6 <= found <= wanted + SLACK_S


# --- the three steps ------------------------------------------------------------------------------


@virtually
async def test_three_steps_in_order_each_when_the_one_before_is_over(script: Script) -> None:
    script.brokers = {"b1": "", "b2": ""}
    script.connections = Counter(msg=2)
    script.at(0.1, lambda: script.agree("b2"))
    script.at(0.3, lambda: script.agree("b1"))
    script.push("g1", 1.0)
    script.push("g2", 0.5)
    drain = script.drain(cause="signal")
    drain.begin()
    assert script.done == ["suspend"]
    running = asyncio.ensure_future(drain.run())
    await asyncio.sleep(0.15)
    found = drain.status()
    assert (found["step"], found["cause"]) == ("suspend", "signal")
    assert (found["since_ms"], found["deadline_ms"]) == (150, 850)
    assert found["waiting_for"] == {"brokers": ["b1"]}
    assert drain.figures().waiting == {"brokers": 1}
    await reached(drain, "answers")
    assert near(script.took_s, 0.3)
    await asyncio.sleep(0.1)
    found = drain.status()
    assert found["waiting_for"] == {"groups": {"g1": 1, "g2": 1}}
    assert drain.figures().waiting == {"groups": 2}
    assert found["steps"] == [
        {"step": "suspend", "outcome": "done", "took_ms": found["steps"][0]["took_ms"], "left": {}}
    ]
    assert not drain.safe
    await reached(drain, "clients")
    assert near(script.took_s, 1.0)
    assert script.done == ["suspend", "close groups", "let go"]
    await asyncio.sleep(0.05)
    assert drain.status()["waiting_for"] == {"connections": {"msg": 2}}
    assert not drain.safe
    script.connections.clear()
    assert await running == "done"
    assert (drain.step, drain.safe) == ("done", True)
    assert outcomes(drain) == dict.fromkeys(("suspend", "answers", "clients"), "done")
    assert script.totals == {(step, "done"): 1 for step in ("suspend", "answers", "clients")}
    lines = script.lines.text()
    for step in ("suspend", "answers", "clients"):
        assert f"drain step begins step={step} cause=signal" in lines
        assert f"drain step step={step} outcome=done" in lines
    assert "safe to stop" in lines


@virtually
async def test_without_a_message_mesh_clients_are_let_go_at_once(script: Script) -> None:
    script.has_mesh = False
    script.connections = Counter(rpc=1)
    drain = script.drain()
    drain.begin()
    assert (script.done, drain.step) == (["let go"], "clients")
    assert drain.is_letting_go
    script.at(0.2, script.connections.clear)
    assert await drain.run() == "done"
    assert near(script.took_s, 0.2)
    assert outcomes(drain) == {"suspend": "skipped", "answers": "skipped", "clients": "done"}
    assert "suspend" not in script.done


@virtually
async def test_nothing_to_wait_for_takes_no_longer_than_the_quiet(script: Script) -> None:
    assert await script.drain().run() == "done"
    assert near(script.took_s, QUIET_S)


@virtually
async def test_begin_may_be_left_to_run(script: Script) -> None:
    drain = script.drain()
    assert drain.status()["step"] == IDLE["step"] == "none"
    await drain.run()
    assert script.done == ["suspend", "close groups", "let go"]


# --- deadlines, and what comes of them ------------------------------------------------------------


@virtually
async def test_a_broker_that_does_not_answer_is_waited_for_and_named(script: Script) -> None:
    script.brokers = {"b1": "", "b2": "reject: never heard of it"}
    drain = script.drain()
    running = asyncio.ensure_future(drain.run())
    await reached(drain, "answers")
    assert near(script.took_s, 1.0)
    (step,) = drain.status()["steps"]
    assert step["outcome"] == "passed"
    assert step["left"] == {"brokers": {"b1": "no answer yet", "b2": "reject: never heard of it"}}
    assert await running == "done", "it goes on, and what they push is served, then refused"
    assert 'brokers="b1 no answer yet' in script.lines.text()


@virtually
async def test_a_refusal_is_an_answer_and_stays_in_the_books(script: Script) -> None:
    script.brokers = {"b1": "reject: never heard of it"}
    drain = script.drain()
    await drain.run()
    assert near(script.took_s, QUIET_S)
    assert outcomes(drain)["suspend"] == "done"
    assert drain.status()["steps"][0]["left"] == {"brokers": {"b1": "reject: never heard of it"}}


@virtually
async def test_pushes_that_nobody_answers_are_named_with_their_number(script: Script) -> None:
    for group, count in (("g1", 3), ("g2", 1)):
        for _ in range(count):
            script.push(group)
    script.connections["msg"] = 1  # it owes answers: it stays
    drain = script.drain()
    drain.begin()
    until = asyncio.get_running_loop().time() + STOP_S
    drain.stop(until)
    running = asyncio.ensure_future(drain.run())
    await reached(drain, "clients")
    assert near(script.took_s, 3.0)
    step = drain.status()["steps"][1]
    assert (step["outcome"], step["left"]) == ("passed", {"groups": {"g1": 3, "g2": 1}})
    assert script.done == ["suspend", "close groups", "let go"]
    assert await running == "passed"
    assert near(script.took_s, STOP_S)
    assert drain.status()["steps"][2]["left"] == {
        "groups": {"g1": 3, "g2": 1},
        "connections": {"msg": 1},
    }
    assert drain.told() == {"groups": "g1 3, g2 1", "connections": "msg 1"}
    assert not drain.safe
    assert 'outcome=passed took_ms=3000 groups="g1 3, g2 1"' in script.lines.text()


@virtually
async def test_only_the_largest_groups_are_named(script: Script) -> None:
    count = limits.DRAIN_GROUPS_SHOWN + 5
    for number in range(count):
        for _ in range(number + 1):
            script.push(f"g{number}")
    drain = script.drain()
    drain.begin()
    running = asyncio.ensure_future(drain.run())
    await asyncio.sleep(0.5)
    named = drain.status()["waiting_for"]["groups"]
    assert list(named)[:2] == [f"g{count - 1}", f"g{count - 2}"]
    assert named[limits.OTHER_NAME] == 1 + 2 + 3 + 4 + 5
    assert drain.figures().waiting["groups"] == count * (count + 1) // 2
    drain.cut()
    script.groups.clear()
    await running


@virtually
async def test_pushes_that_come_after_suspend_are_served(script: Script) -> None:
    """A broker that keeps pushing is served until the deadline, and refused then."""

    def again() -> None:
        script.push("g1", 0.005)
        if drain.step != "done":
            script.at(0.05, again)

    drain = script.drain()
    again()
    assert await drain.run() == "done"
    assert outcomes(drain)["answers"] == "passed"
    assert near(script.took_s, 3.0)
    served = script.pushed - script.done.count("refused")
    assert served >= 3.0 / 0.05 - 1
    first = script.done.index("refused") if "refused" in script.done else len(script.done)
    assert "close groups" in script.done[:first]


@virtually
async def test_a_push_that_was_under_way_when_all_had_agreed_is_served(script: Script) -> None:
    drain = script.drain()
    script.at(QUIET_S / 2, lambda: script.push("g1", 0.3))
    await drain.run()
    assert "refused" not in script.done
    assert near(script.took_s, QUIET_S / 2 + 0.3)


@virtually
async def test_a_push_that_slips_in_while_groups_close_is_waited_for(script: Script) -> None:
    drain = script.drain()
    close = script.close_groups

    def slips_in() -> None:
        if not script.closed:
            script.push("g1", 0.7)
        close()

    script.close_groups = slips_in  # type: ignore[method-assign]
    await drain.run()
    assert near(script.took_s, QUIET_S + 0.7)
    assert outcomes(drain)["answers"] == "done"


@virtually
async def test_a_planned_drain_waits_on_after_its_deadlines_and_says_so(script: Script) -> None:
    script.connections = Counter(rpc=1)
    drain = script.drain()
    running = asyncio.ensure_future(drain.run())
    await asyncio.sleep(60)
    found = drain.status()
    assert (found["step"], found["outcome"], found["deadline_ms"]) == ("clients", "passed", None)
    assert found["waiting_for"] == {"connections": {"rpc": 1}}
    assert 'drain step is late step=clients connections="rpc 1"' in script.lines.text()
    script.connections.clear()
    assert await running == "late"
    assert (drain.step, drain.safe, outcomes(drain)["clients"]) == ("done", True, "late")


@virtually
async def test_times_shorter_than_the_quiet_do_not_make_every_drain_late(script: Script) -> None:
    drain = script.drain(times=Times(40, 120, 40))
    await drain.run()
    assert outcomes(drain) == dict.fromkeys(("suspend", "answers", "clients"), "done")
    assert script.took_s <= 0.2


@virtually
async def test_no_time_at_all_still_says_everything(script: Script) -> None:
    script.brokers = {"b1": ""}
    script.push("g1")
    script.connections = Counter(msg=1)
    drain = script.drain(times=Times(0, 0, 0))
    drain.stop(asyncio.get_running_loop().time())
    assert await drain.run() == "passed"
    assert script.done == ["suspend", "close groups", "let go"]
    assert script.took_s <= SLACK_S


# --- a stop ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_s", [0.0, 0.5, 2.0, 4.5, 20.0])
def test_a_stop_ends_within_its_time_wherever_a_drain_is(log_lines: LogLines, at_s: float) -> None:
    async def main() -> None:
        script = Script(log_lines)
        script.brokers = {"b1": ""}
        script.push("g1")
        script.connections = Counter(msg=1)
        drain = script.drain()
        drain.begin()
        running = asyncio.ensure_future(drain.run())
        loop = asyncio.get_running_loop()
        await asyncio.sleep(at_s)
        began = loop.time()
        drain.stop(began + STOP_S)
        assert await running == "passed"
        assert near(loop.time() - began, STOP_S)
        assert script.done == ["suspend", "close groups", "let go"]

    run_virtually(main())


@pytest.mark.parametrize("step", ["suspend", "answers", "clients"])
@pytest.mark.parametrize("stopping", [True, False])
def test_a_second_signal_ends_every_step_at_once(
    log_lines: LogLines, step: str, stopping: bool
) -> None:
    async def main() -> None:
        script = Script(log_lines)
        script.brokers = {"b1": ""}
        script.push("g1")
        script.connections = Counter(msg=1)
        drain = script.drain()
        running = asyncio.ensure_future(drain.run())
        loop = asyncio.get_running_loop()
        await reached(drain, step)
        await asyncio.sleep(0.2)
        before = loop.time()
        if stopping:
            drain.stop(before + STOP_S)
        drain.cut()
        assert await running == "cut"
        assert loop.time() - before < 0.01
        assert script.done == ["suspend", "close groups", "let go"]
        assert outcomes(drain)[step] == "cut"
        assert not drain.safe

    run_virtually(main())


# --- hold, release, cancel ------------------------------------------------------------------------


@virtually
async def test_hold_keeps_clients_and_is_safe_when_pushes_are_answered(script: Script) -> None:
    script.connections = Counter(msg=1)
    script.push("g1", 1.0)
    drain = script.drain(hold=True)
    running = asyncio.ensure_future(drain.run())
    await asyncio.sleep(0.5)
    assert not drain.safe
    await asyncio.sleep(60)
    found = drain.status()
    assert (found["step"], found["outcome"], found["hold"]) == ("answers", "done", True)
    assert (found["safe_to_stop"], found["deadline_ms"]) == (True, None)
    assert script.done == ["suspend", "close groups"]
    script.push("g1")
    assert script.done[-1] == "refused", "nothing is delivered once it is safe to stop"
    drain.release()
    await reached(drain, "clients")
    assert not drain.safe
    script.connections.clear()
    assert await running == "done"
    assert outcomes(drain)["answers"] == "done"


@virtually
async def test_hold_waits_for_late_answers_without_end(script: Script) -> None:
    script.push("g1", 100.0)
    drain = script.drain(hold=True)
    running = asyncio.ensure_future(drain.run())
    await asyncio.sleep(50)
    found = drain.status()
    assert (found["step"], found["outcome"]) == ("answers", "passed")
    assert found["waiting_for"] == {"groups": {"g1": 1}}
    assert script.done == ["suspend", "close groups"], "nothing joins what is in flight"
    await asyncio.sleep(51)
    assert drain.safe
    drain.stop(asyncio.get_running_loop().time() + STOP_S)
    assert await running == "done"
    assert outcomes(drain)["answers"] == "late"


@virtually
async def test_release_does_not_wait_for_answers_that_are_late(script: Script) -> None:
    script.push("g1")
    script.connections["msg"] = 1
    drain = script.drain(hold=True)
    running = asyncio.ensure_future(drain.run())
    await asyncio.sleep(50)
    drain.release()
    await reached(drain, "clients")
    assert near(script.took_s, 50)
    assert outcomes(drain)["answers"] == "passed"
    script.connections.clear()
    assert await running == "done"


@virtually
async def test_a_stop_of_a_held_drain_gives_late_answers_their_time_again(script: Script) -> None:
    script.push("g1", 51.0)
    drain = script.drain(hold=True)
    running = asyncio.ensure_future(drain.run())
    await asyncio.sleep(50)
    drain.stop(asyncio.get_running_loop().time() + STOP_S)
    assert await running == "done"
    assert near(script.took_s, 51)


@virtually
async def test_hold_may_come_later_but_not_too_late(script: Script) -> None:
    script.push("g1", 1.0)
    drain = script.drain()
    running = asyncio.ensure_future(drain.run())
    await asyncio.sleep(0.5)
    drain.hold()
    await asyncio.sleep(10)
    assert (drain.step, drain.safe) == ("answers", True)
    script.connections["msg"] = 1
    drain.release()
    await reached(drain, "clients")
    with pytest.raises(StateError, match="let go already"):
        drain.hold()
    script.connections.clear()
    await running


@pytest.mark.parametrize("at_s", [0.0, 0.5, 1.5, 100.0])
@pytest.mark.parametrize("hold", [True, False])
def test_cancel_takes_everything_back(log_lines: LogLines, at_s: float, hold: bool) -> None:
    async def main() -> None:
        script = Script(log_lines)
        script.brokers = {"b1": ""}
        script.at(1.0, lambda: script.agree("b1"))
        script.push("g1", 2.0)
        script.connections = Counter(msg=1)
        drain = script.drain(hold=hold)
        drain.begin()
        running = asyncio.ensure_future(drain.run())
        await asyncio.sleep(at_s)
        if at_s == 100.0 and not hold:
            with pytest.raises(StateError, match="let go already"):
                drain.cancel()
            drain.cut()
            await running
            return
        drain.cancel()
        assert script.done[-1] == "resume"
        assert (drain.step, drain.safe, script.closed) == ("none", False, False)
        assert await running == "cancelled"
        await asyncio.sleep(100)
        assert script.done[-1] == "resume", "nothing more is said"
        assert drain.status()["steps"][-1]["outcome"] == "cancelled"
        assert sum(n for (_, how), n in script.totals.items() if how == "cancelled") == 1
        with pytest.raises(StateError, match="no drain"):
            drain.cancel()
        assert "drain cancelled" in log_lines.text()

    run_virtually(main())


@virtually
async def test_cancel_is_refused_once_the_process_is_to_stop(script: Script) -> None:
    script.push("g1")
    drain = script.drain()
    running = asyncio.ensure_future(drain.run())
    await asyncio.sleep(0.5)
    drain.stop(asyncio.get_running_loop().time() + STOP_S)
    with pytest.raises(StateError, match="stopping"):
        drain.cancel()
    script.groups.clear()
    assert await running == "done"
    assert "resume" not in script.done


# --- a hand-over ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [True, False])
def test_listeners_go_between_answers_and_clients(log_lines: LogLines, mesh: bool) -> None:
    async def main() -> None:
        script = Script(log_lines, mesh=mesh)
        script.connections = Counter(msg=1)
        if mesh:
            script.push("g1", 0.5)

        async def may_go() -> None:
            assert not +script.groups
            assert "let go" not in script.done
            script.done.append("listeners went")
            await asyncio.sleep(0.2)
            assert "let go" not in script.done
            script.at(0.3, script.connections.clear)

        drain = script.drain(cause="upgrade", may_go=may_go)
        drain.begin()
        assert not drain.is_letting_go
        for what in (drain.cancel, drain.hold):
            with pytest.raises(StateError, match="upgrade"):
                what()
        assert await drain.run() == "done"
        first = ["suspend", "close groups"] if mesh else []
        assert script.done == [*first, "listeners went", "let go, paths stay"]

    run_virtually(main())


@pytest.mark.parametrize("mesh", [True, False])
def test_listeners_that_do_not_go_bring_everything_back(log_lines: LogLines, mesh: bool) -> None:
    async def main() -> None:
        script = Script(log_lines, mesh=mesh)

        async def may_go() -> None:
            raise ConnectionResetError("the new process is gone")

        drain = script.drain(cause="upgrade", may_go=may_go)
        with pytest.raises(ConnectionResetError):
            await drain.run()
        assert script.done == [*(["suspend", "close groups"] if mesh else []), "resume"]
        assert (drain.step, drain.is_letting_go) == ("none", False)

    run_virtually(main())


@pytest.mark.parametrize("at_s", [0.2, 1.2, 2.5])
def test_a_hand_over_that_is_given_up_brings_everything_back(
    log_lines: LogLines, at_s: float
) -> None:
    """In the first step, in the second, and while somebody still has to take the listeners."""

    async def main() -> None:
        script = Script(log_lines)
        script.brokers = {"b1": ""}
        script.at(1.0, lambda: script.agree("b1"))
        script.push("g1", 2.0)

        async def never() -> None:
            await asyncio.get_running_loop().create_future()

        drain = script.drain(cause="upgrade", may_go=never)
        running = asyncio.ensure_future(drain.run())
        await asyncio.sleep(at_s)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert script.done[-1] == "resume"
        assert (drain.step, script.closed) == ("none", False)

    run_virtually(main())


@virtually
async def test_a_hand_over_does_not_wait_for_its_last_clients_without_end(script: Script) -> None:
    script.connections = Counter(msg=1)

    async def may_go() -> None:
        await asyncio.sleep(0)

    drain = script.drain(cause="upgrade", may_go=may_go)
    assert await drain.run() == "passed"
    assert near(script.took_s, STOP_S)
    assert drain.told() == {"connections": "msg 1"}


# --- what is broken -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["fails", "hangs"])
def test_an_engine_that_does_not_answer_costs_the_deadlines_and_no_more(
    log_lines: LogLines, how: str
) -> None:
    async def main() -> None:
        script = Script(log_lines)
        script.connections = Counter(msg=1)
        if how == "fails":
            script.engine_failure = "the engine did not answer in 2 s: counters"
        script.hangs = how == "hangs"
        drain = script.drain()
        drain.stop(asyncio.get_running_loop().time() + STOP_S)
        assert await drain.run() == "passed"
        assert near(script.took_s, STOP_S)
        assert script.done == ["suspend", "close groups", "let go"]
        assert not drain.safe
        if how == "fails":
            assert "did not answer" in drain.told()["engine"]

    run_virtually(main())


@virtually
async def test_a_full_command_ring_is_tried_again(script: Script) -> None:
    script.refuses_commands = 7
    drain = script.drain()
    assert await drain.run() == "done"
    assert script.done[-1] == "let go"
    assert script.refuses_commands == 0


@pytest.mark.parametrize("what", ["suspending", "look", "groups_closed", "gone"])
def test_a_fault_of_ours_does_not_keep_a_process_from_leaving(
    log_lines: LogLines, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        script = Script(log_lines)

        def broken() -> Awaitable[Any]:
            raise RuntimeError("a fault")

        monkeypatch.setattr(script, what, broken)
        drain = script.drain()
        drain.stop(asyncio.get_running_loop().time() + STOP_S)
        assert await drain.run() == ("fault" if what in ("gone",) else "done")
        assert script.done == ["suspend", "close groups", "let go"]
        assert "fault" in outcomes(drain).values()
        assert "a fault" in log_lines.text()

    run_virtually(main())


# --- whatever happens -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(200))
def test_whatever_is_asked_and_whenever(seed: int, log_lines: LogLines) -> None:
    """Suspend before groups are closed, that before anybody is let go; after a cancel nobody is; a
    stop ends in time; what is safe has nothing in flight."""
    chance = random.Random(seed)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        script = Script(log_lines, mesh=chance.random() < 0.9)
        script.connections = Counter(msg=chance.randrange(3))
        for name in ("b1", "b2"):
            script.brokers[name] = chance.choice(("", "", "refused"))
            if chance.random() < 0.7:
                script.at(chance.uniform(0, 2), lambda name=name: script.agree(name))
        for _ in range(chance.randrange(20)):
            answered = chance.choice((0.0, 0.1, 1.0, 5.0, None))
            script.at(chance.uniform(0, 6), lambda a=answered: script.push("g1", a))
        if chance.random() < 0.7:
            script.at(chance.uniform(0, 8), script.connections.clear)
        went: list[float] = []

        async def may_go() -> None:
            await asyncio.sleep(chance.uniform(0, 1))
            if chance.random() < 0.3:
                raise ConnectionResetError
            went.append(loop.time())

        upgrade = chance.random() < 0.2
        drain = script.drain(
            hold=not upgrade and chance.random() < 0.3,
            cause="upgrade" if upgrade else "admin",
            may_go=may_go if upgrade else None,
        )
        stop_at = chance.uniform(0, 10)

        def look() -> None:
            if drain.safe:
                assert not +script.groups, drain.status()
                assert script.closed or not script.has_mesh
            drain.figures()
            if not running.done():
                script.at(0.05, look)

        def ask() -> None:
            what = chance.choice((drain.hold, drain.release, drain.cancel, drain.release))
            with contextlib.suppress(StateError):
                what()

        drain.begin()
        running = asyncio.ensure_future(drain.run())
        look()
        for _ in range(chance.randrange(4)):
            script.at(chance.uniform(0, 10), ask)
        script.at(stop_at, lambda: drain.stop(loop.time() + STOP_S))
        if chance.random() < 0.2:
            script.at(stop_at + chance.uniform(0, 3), drain.cut)
        try:
            outcome = await running
        except ConnectionResetError:
            outcome = "cancelled"
        assert script.took_s <= stop_at + STOP_S + 1 + SLACK_S
        done = [what for what in script.done if what != "refused"]
        if outcome == "cancelled":
            assert not any(what.startswith("let go") for what in done), done
            assert done[-1] == "resume" or not script.has_mesh
            assert not script.closed
        else:
            wanted = ["suspend", "close groups"] if script.has_mesh else []
            assert done == [*wanted, "let go, paths stay" if upgrade else "let go"]
            assert bool(went) is upgrade
            if outcome in ("done", "late"):
                assert drain.safe

    run_virtually(main())


def test_the_steps_share_the_time_of_a_stop() -> None:
    assert limits.drain_times(5000, 0, 0) == (1000, 3000, 1000)
    assert limits.drain_times(60_000, 0, 0) == (limits.CONTROL_TIMEOUT_MS, 36_000, 21_000)
    assert limits.drain_times(5000, 0, 4500) == (1000, 4000, 0)
    assert limits.drain_times(5000, 4000, 0) == (4000, 1000, 0)
    assert limits.drain_times(5000, 2000, 2000) == (2000, 2000, 1000)
    assert limits.drain_times(0, 0, 0) == (0, 0, 0)
