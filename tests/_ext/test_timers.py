"""The timer wheel: never early, never late by more than a tick, never lost."""

import random

import pytest

from fastmesh._ext.timers import TimerWheel, sizes

TICK_MS = 4
BUCKETS = 4096
REVOLUTION_MS = TICK_MS * BUCKETS
DAY_MS = 24 * 3600 * 1000


def all_due(wheel: TimerWheel, now_ms: int) -> list[int]:
    found = []
    while (name := wheel.due(now_ms)) is not None:
        found.append(name)
        assert len(found) <= wheel.timers
    return found


def test_fires_when_due_and_never_early() -> None:
    for at_ms in range(1000, 1020):
        wheel = TimerWheel(1, now_ms=1000)
        wheel.set(0, at_ms)
        fired = next(now for now in range(1000, 1040) if wheel.due(now) == 0)
        assert at_ms <= fired < at_ms + TICK_MS
        assert wheel.armed == 0


def test_nothing_armed_sleeps_for_ever() -> None:
    wheel = TimerWheel(1)
    assert wheel.sleep_ms(5) == -1
    assert wheel.due(10**12) is None


def test_past_is_due_at_once_before_and_after_its_bucket_was_served() -> None:
    wheel = TimerWheel(3, now_ms=50_000)
    wheel.set(0, 0)
    assert wheel.sleep_ms(50_000) == 0
    assert all_due(wheel, 50_000) == [0]
    wheel.set(1, 50_000)  # the bucket of this very moment was served a line ago
    assert wheel.sleep_ms(50_000) == 0
    assert all_due(wheel, 50_000) == [1]


def test_one_of_a_later_revolution_stays_and_does_not_hold_up_the_wheel() -> None:
    wheel = TimerWheel(2, now_ms=0)
    wheel.set(0, 400)
    wheel.set(1, 400 + 3 * REVOLUTION_MS)  # the same bucket
    assert all_due(wheel, 400) == [0]
    wheel.check()
    for revolution in (1, 2):
        assert all_due(wheel, 400 + revolution * REVOLUTION_MS) == []
    assert all_due(wheel, 399 + 3 * REVOLUTION_MS) == []
    assert all_due(wheel, 400 + 3 * REVOLUTION_MS) == [1]


def test_all_timers_of_one_tick_come_out_oldest_bucket_first() -> None:
    wheel = TimerWheel(12, now_ms=0)
    for name in range(10):
        wheel.set(name, 97 + name % 4)
    wheel.set(10, 50)
    wheel.set(11, 104)
    assert wheel.due(100) == 10
    assert sorted(all_due(wheel, 100)) == list(range(10))
    assert all_due(wheel, 104) == [11]


def test_a_jump_of_days_serves_every_bucket_once() -> None:
    wheel = TimerWheel(200, now_ms=7)
    for name in range(100):
        wheel.set(name, 7 + name * 1000)
    for name in range(100, 200):
        wheel.set(name, 30 * DAY_MS + name)
    assert sorted(all_due(wheel, 10 * DAY_MS)) == list(range(100))
    wheel.check()
    assert wheel.sleep_ms(10 * DAY_MS) > 0
    assert sorted(all_due(wheel, 31 * DAY_MS)) == list(range(100, 200))


def test_a_bounded_caller_gets_the_rest_later_also_over_a_jump() -> None:
    wheel = TimerWheel(100)
    for name in range(100):
        wheel.set(name, name * 500)
    served = []
    now_ms = DAY_MS
    while wheel.armed:
        assert wheel.sleep_ms(now_ms) == 0
        for _ in range(3):
            found = wheel.due(now_ms)
            if found is not None:
                served.append(found)
        wheel.check()
        now_ms += REVOLUTION_MS + 1
    assert sorted(served) == list(range(100))


def test_setting_again_moves_also_one_that_was_found_due() -> None:
    wheel = TimerWheel(3)
    for name in range(3):
        wheel.set(name, 8)
    first = wheel.due(8)  # the other two are found due now, and not handed out
    others = sorted({0, 1, 2} - {first})
    wheel.set(others[1], 5000)
    wheel.check()
    assert all_due(wheel, 8) == [others[0]]
    wheel.set(others[0], 3)
    wheel.clear(others[0])
    wheel.check()
    assert all_due(wheel, 4999) == []
    assert all_due(wheel, 5000) == [others[1]]


def test_one_that_is_set_in_the_past_for_ever_starves_nobody() -> None:
    wheel = TimerWheel(2)
    wheel.set(0, 4)
    wheel.set(1, 4)
    seen = set()
    for _ in range(4):
        name = wheel.due(8)
        assert name is not None
        seen.add(name)
        wheel.set(name, 0)
    assert seen == {0, 1}


def test_clearing_is_idempotent_and_forgets_the_wake_up() -> None:
    wheel = TimerWheel(2)
    wheel.set(0, 100)
    wheel.set(1, 2000)
    assert wheel.sleep_ms(0) == 100
    wheel.clear(0)
    wheel.clear(0)
    assert wheel.armed == 1
    assert wheel.sleep_ms(0) == 2000
    wheel.check()


def test_the_largest_time_does_not_overflow() -> None:
    wheel = TimerWheel(1, now_ms=10)
    wheel.set(0, 2**64 - 1)
    wheel.check()
    assert all_due(wheel, 100 * DAY_MS) == []
    assert wheel.armed == 1


@pytest.mark.parametrize("seed", range(20))
def test_against_a_dictionary(seed: int) -> None:
    rng = random.Random(seed)
    timers = 40
    now_ms = rng.choice([0, 5, 10**6, 10**10])
    wheel = TimerWheel(timers, now_ms)
    model: dict[int, int] = {}

    def due_tick(at_ms: int) -> int:
        return -(-at_ms // TICK_MS)

    for _ in range(2000):
        action = rng.random()
        name = rng.randrange(timers)
        if action < 0.5:
            far = rng.choice([-50, 0, 1, 5, 40, 2000, 20_000, REVOLUTION_MS, 90_000])
            model[name] = max(0, now_ms + far + rng.randrange(-3, 4))
            wheel.set(name, model[name])
        elif action < 0.6:
            wheel.clear(name)
            model.pop(name, None)
        else:
            steps = [0, 0, 1, 3, 4, 7, 100, REVOLUTION_MS, REVOLUTION_MS - 4, 20_000, 3 * DAY_MS]
            now_ms += rng.choice(steps)
            sleep_ms = wheel.sleep_ms(now_ms)
            if model:
                earliest = min(due_tick(at) * TICK_MS for at in model.values())
                assert sleep_ms >= 0
                assert now_ms + sleep_ms <= max(now_ms, earliest)
            else:
                assert sleep_ms == -1
            due = {n for n, at in model.items() if due_tick(at) <= now_ms // TICK_MS}
            for _ in range(rng.choice([1, 3, 1000])):
                found = wheel.due(now_ms)
                if found is None:
                    assert not due
                    break
                assert found in due
                due.discard(found)
                del model[found]
        wheel.check()
        assert wheel.armed == len(model)


def test_a_timer_fits_in_one_cache_line() -> None:
    assert sizes()["Timer"] <= 64
