"""The registry: what is accepted, what conflicts, what a group is, and how long it lasts."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmesh import limits
from fastmesh.errors import HandoverError
from fastmesh.mesh.registration import (
    Change,
    Group,
    InvalidError,
    Key,
    Outcome,
    Registry,
    decode_state,
    parse,
)

S = 1000


def doc(client: str = "c1", *groups: dict[str, Any], app: str = "shop", **more: Any) -> bytes:
    found = groups or (sub(),)
    return json.dumps({"app": app, "client": client, "groups": found, **more}).encode()


def sub(name: str = "g", topic: str = "orders", **more: Any) -> dict[str, Any]:
    return {"name": name, "topic": topic, "role": "subscribe", **more}


def pub(name: str = "g", topic: str = "orders", **more: Any) -> dict[str, Any]:
    return {"name": name, "topic": topic, "role": "publish", **more}


class Watched:
    """A registry and the changes that it told."""

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.registry = Registry(self.changes.append)

    def register(self, *args: Any, now_ms: int = 0, **more: Any) -> Outcome:
        return self.registry.register(doc(*args, **more), now_ms)

    def group(self, name: str = "g") -> Group:
        return self.registry.groups()[name]

    @property
    def last(self) -> Change:
        return self.changes[-1]


@pytest.fixture
def it() -> Watched:
    return Watched()


# --- documents ------------------------------------------------------------------------------------


def test_defaults_are_filled_in_and_the_document_can_be_sent_again() -> None:
    found = parse(doc("c1", sub(), pub("p", "bills")))
    assert json.loads(found.document) == {
        "app": "shop",
        "client": "c1",
        "topics": [],
        "groups": [
            {
                "name": "g",
                "topic": "orders",
                "role": "subscribe",
                "prefetch": 32,
                "ordered": False,
                "mode": "cluster",
            },
            {"name": "p", "topic": "bills", "role": "publish"},
        ],
        "lease_ms": 30000,
    }
    assert parse(found.document) == found
    assert parse(found.document).document == found.document


def test_order_and_repetition_say_nothing() -> None:
    one = parse(doc("c1", sub("a"), pub("b"), topics=[{"name": "y"}, {"name": "x"}, {"name": "y"}]))
    two = parse(doc("c1", pub("b"), sub("a"), topics=[{"name": "x"}, {"name": "y"}]))
    assert one.document == two.document


def test_both_roles_of_one_group_are_one_membership() -> None:
    group = parse(doc("c1", pub(), sub(prefetch=5))).groups["g"]
    assert group.publishes
    assert group.subscription is not None
    assert group.subscription.prefetch == 5


def errors(document: bytes) -> list[tuple[str, Any, str]]:
    with pytest.raises(InvalidError) as caught:
        parse(document)
    outcome = caught.value.outcome()
    assert outcome.status == 422
    assert not outcome.changed
    assert Registry().register(document, 0) == outcome
    return [(e["path"], e["value"], e["message"]) for e in outcome.body["errors"]]


def test_all_problems_are_told_at_once() -> None:
    document = {
        "app": "a b",
        "client": 7,
        "lease_ms": 999,
        "lease": 1,
        "topics": [{"name": ""}, "x"],
        "groups": [
            {"name": "g", "topic": "t,u", "role": "both"},
            sub("h", prefetch=0, ordered="yes", mode="all", filter="colour"),
            pub("p", prefetch=1, mode="broadcast", filer="x"),
            sub("h"),
            {"role": "publish"},
            sub("o", ordered=True, mode="broadcast"),
        ],
    }
    found = errors(json.dumps(document).encode())
    assert [(path, value) for path, value, _ in found] == [
        ("app", "a b"),
        ("client", 7),
        ("lease_ms", 999),
        ("topics[0].name", ""),
        ("topics[1]", "x"),
        ("groups[0].topic", "t,u"),
        ("groups[0].role", "both"),
        ("groups[1].filter", "colour"),
        ("groups[1].prefetch", 0),
        ("groups[1].ordered", "yes"),
        ("groups[1].mode", "all"),
        ("groups[2].mode", "broadcast"),
        ("groups[2].prefetch", 1),
        ("groups[2].filer", None),
        ("groups[3].name", "h"),
        ("groups[4].name", None),
        ("groups[4].topic", None),
        ("groups[5].ordered", True),
        ("lease", None),
    ]
    told = {path: message for path, _, message in found}
    assert told["app"].startswith("must be a name of 1..127 ")
    assert told["lease_ms"] == "must be a whole number 1000..86400000"
    assert told["lease"] == "is not a known key: did you mean lease_ms?"
    assert told["groups[0].role"] == "must be subscribe or publish"
    assert told["groups[2].filer"] == "is not a known key: did you mean filter?"
    assert told["groups[3].name"] == "stands with role subscribe in groups[1] already"
    assert told["groups[4].name"] == "is missing"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (b"", "is not JSON: Expecting value (line 1, column 1)"),
        (b"{", "is not JSON: "),
        (b'{"app": NaN}', "is not JSON: NaN is no JSON value"),
        (b'{"app": ' + b"9" * 5000 + b"}", "is not JSON: "),
        (b"[" * 100_000, "is nested deeper than 32 levels"),
        (b'"\xff"', "is not UTF-8 at byte 1"),
        (b"[]", "must be a mapping with app, client, topics and groups"),
        (b" " * (limits.REGISTRATION_BODY_BYTES_MAX + 1), "must be at most 524288 bytes long"),
    ],
)
def test_what_is_no_document(document: bytes, message: str) -> None:
    [(path, _, told)] = errors(document)
    assert path == ""
    assert message in told


def test_a_key_given_twice_is_told() -> None:
    document = b'{"app":"a","app":"b","client":"c","groups":[{"name":"g","name":"h"}]}'
    found = [(path, message) for path, _, message in errors(document)]
    assert ("app", "is given twice") in found
    assert ("groups[0].name", "is given twice") in found


def test_values_of_any_kind_can_be_told() -> None:
    document = (
        b'{"app": "\\ud800", "client": {"a": []}, "lease_ms": 123456789012345678901234567890}'
    )
    values = {path: value for path, value, _ in errors(document)}
    assert values == {
        "app": "\\ud800",
        "client": "a mapping",
        "lease_ms": "a number beyond 64 bits",
    }


def test_more_problems_than_are_listed_become_a_number() -> None:
    found = errors(doc("c1", *[{"role": "x"}] * 200))
    assert len(found) == limits.CONFIG_PROBLEMS_MAX + 1
    assert found[-1] == ("", None, "and 500 more problems")


@pytest.mark.parametrize(
    "change",
    [
        {"groups": [sub(f"g{i}") for i in range(limits.REGISTRATION_GROUPS_MAX + 1)]},
        {"topics": [{"name": "t"}] * (limits.REGISTRATION_GROUPS_MAX + 1)},
        {"groups": [sub(filter="colour=" + "x" * limits.FILTER_CHARS_MAX)]},
        {"groups": [sub(filter="colour=\ud800")]},
        {"groups": [sub(prefetch=65536)]},
        {"groups": [sub(prefetch=True)]},
        {"groups": [sub(prefetch=1.0)]},
        {"groups": [pub(), sub(topic="others")]},
        {"groups": [], "topics": []},
        {"lease_ms": 86_400_001},
        {"client": "c" * 128},
        {"app": "shop\n"},
    ],
)
def test_bounds_of_a_document(change: dict[str, Any]) -> None:
    document = {"app": "shop", "client": "c1", "groups": [sub()]} | change
    assert len(errors(json.dumps(document).encode())) == 1


@settings(max_examples=300, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(
                    ["app", "client", "topics", "groups", "name", "topic", "role", "filter", "x"]
                ),
                inner,
                max_size=6,
            )
        ),
        max_leaves=20,
    )
)
def test_any_json_is_a_registration_or_a_list_of_problems(value: Any) -> None:
    document = json.dumps(value).encode()
    outcome = Registry().register(document, 0)
    assert outcome.status in (201, 422)
    json.dumps(dict(outcome.body), allow_nan=True).encode()
    if outcome.status == 422:
        assert outcome.body["errors"]


# --- outcomes -------------------------------------------------------------------------------------


def test_new_same_and_changed(it: Watched) -> None:
    assert it.register("c1") == Outcome(
        201,
        {"registration": "new", "app": "shop", "client": "c1", "lease_ms": 30000},
        changed=True,
    )
    same = it.register("c1", now_ms=10 * S)
    assert (same.status, same.body["registration"], same.changed) == (200, "same", False)
    assert len(it.changes) == 1, "a renewal is no change"
    changed = it.register("c1", sub("g"), sub("h"))
    assert (changed.status, changed.body["registration"], changed.changed) == (200, "changed", True)
    assert it.last == Change(2, frozenset({Key("shop", "c1")}), frozenset({"h"}))


def test_a_changed_registration_replaces_the_old_one_whole(it: Watched) -> None:
    it.register("c1", sub("g"), sub("h", "bills"))
    it.register("c1", sub("h", "parcels"), pub("p"))
    assert set(it.registry.groups()) == {"h", "p"}
    assert it.group("h").topic == "parcels", "who is alone in a group may change anything"
    assert it.last.groups == {"g", "h", "p"}
    assert set(it.registry.topics()) == {"orders", "parcels"}


@pytest.mark.parametrize(
    ("field", "mine", "stands"),
    [
        ("topic", sub(topic="bills"), "orders"),
        ("filter", sub(), "colour=blue"),
        ("ordered", sub(filter="colour=blue"), True),
        ("mode", sub(filter="colour=blue", mode="broadcast"), "cluster"),
    ],
)
def test_a_conflict_names_the_field_the_value_that_stands_and_whose(
    it: Watched, field: str, mine: dict[str, Any], stands: Any
) -> None:
    it.register("c1", sub(filter="colour=blue", ordered=True))
    before = it.registry.state()
    outcome = it.register("c2", mine)
    assert outcome.status == 409
    [found] = [c for c in outcome.body["conflicts"] if c["field"] == field]
    assert (found["stands"], found["app"], found["client"]) == (stands, "shop", "c1")
    assert found["group"] == "g"
    assert "client c1 of shop registered" in found["message"]
    assert (it.registry.state(), len(it.changes)) == (before, 1)
    # The same from whom it stands for is a change, and afterwards the other one is right.
    assert it.register("c1", mine).status == 200
    assert it.register("c2", mine).status == 201


def test_filters_agree_when_they_want_the_same(it: Watched) -> None:
    it.register("c1", sub(filter="colour=blue|green&region=eu"))
    assert it.register("c2", sub(filter="region=eu&colour=green|blue")).status == 201
    assert it.register("c3", sub(filter="region=eu&colour=green")).status == 409


def test_a_group_belongs_to_one_application(it: Watched) -> None:
    it.register("c1", pub("g"))
    outcome = it.register("c1", pub("g"), app="other")
    assert outcome.status == 409
    assert [c["field"] for c in outcome.body["conflicts"]] == ["app"]
    assert outcome.body["conflicts"][0]["stands"] == "shop"


def test_every_conflict_is_told(it: Watched) -> None:
    it.register("c1", sub("g"), sub("h"))
    outcome = it.register("c2", sub("g", "x", mode="broadcast"), sub("h", "x"))
    assert [(c["group"], c["field"]) for c in outcome.body["conflicts"]] == [
        ("g", "topic"),
        ("g", "mode"),
        ("h", "topic"),
    ]
    assert outcome.body["error"].endswith(", and 2 more")


def test_a_group_is_the_union_of_its_clients(it: Watched) -> None:
    it.register("c1", pub(), sub(prefetch=5, filter="colour=blue"))
    it.register("c2", sub(prefetch=7, filter="colour=blue"))
    it.register("c3", pub())
    assert it.group() == Group(
        "g",
        "shop",
        "orders",
        publishers=frozenset({"c1", "c3"}),
        prefetch={"c1": 5, "c2": 7},
        filter="colour=blue",
    )
    assert it.group().roles == {"publish", "subscribe"}
    assert it.registry.remove("shop", "c2")
    assert it.last.groups == {"g"}
    assert it.group().prefetch == {"c1": 5}
    it.registry.remove("shop", "c1")
    assert it.group().roles == {"publish"}
    assert it.group().filter == "", "nobody subscribes: there is nothing to filter"
    it.registry.remove("shop", "c3")
    assert not it.registry.groups()
    assert not it.registry.remove("shop", "c3")


def test_topics_name_their_applications(it: Watched) -> None:
    it.register("c1", sub("g", "orders"), topics=[{"name": "bills"}])
    it.register("c2", sub("h", "orders"), app="other")
    assert it.registry.topics() == {
        "bills": frozenset({"shop"}),
        "orders": frozenset({"shop", "other"}),
    }


@pytest.mark.parametrize(
    ("bound", "most", "what"),
    [
        ("REGISTRATIONS_MAX", 2, "registrations"),
        ("REGISTRATION_CLIENTS_MAX", 2, "clients of shop"),
        ("GROUPS_MAX", 2, "groups"),
        ("REGISTRATION_STATE_BYTES_MAX", 500, "bytes of all registrations"),
    ],
)
def test_bounds_of_the_node(
    it: Watched, monkeypatch: pytest.MonkeyPatch, bound: str, most: int, what: str
) -> None:
    monkeypatch.setattr(limits, bound, most)
    for client in ("c1", "c2"):
        assert it.register(client, sub(f"g-{client}")).status == 201
    outcome = it.register("c3", sub("g-c3"))
    assert outcome.status == 409
    assert f"as many {what} as it takes: {most}" in outcome.body["error"]
    assert it.register("c1", sub("g-c1")).status == 200, "who is there stays"
    it.registry.remove("shop", "c2")
    assert it.register("c3", sub("g-c3")).status == 201


def test_a_replaced_group_makes_room_at_the_bound(
    it: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "GROUPS_MAX", 2)
    it.register("c1", sub("a"), sub("b"))
    assert it.register("c1", sub("c"), sub("d")).status == 200
    assert it.register("c1", sub("c"), sub("d"), sub("e")).status == 409


# --- leases ---------------------------------------------------------------------------------------


def test_a_lease_ends_and_takes_its_client_along(it: Watched) -> None:
    it.register("c1", now_ms=5 * S)
    it.register("c2", now_ms=6 * S)
    assert it.registry.expire(35 * S - 1) == ()
    assert it.registry.expire(35 * S) == (Key("shop", "c1"),)
    assert it.last == Change(3, frozenset({Key("shop", "c1")}), frozenset({"g"}))
    assert it.registry.client("shop", "c1") is None
    assert it.registry.expire(36 * S) == (Key("shop", "c2"),)
    assert not it.registry.groups()
    assert it.register("c1", now_ms=40 * S).status == 201


def test_post_and_touch_renew(it: Watched) -> None:
    it.register("c1")
    it.register("c1", now_ms=20 * S)
    assert it.registry.touch("shop", "c1", 40 * S)
    assert it.registry.expire(70 * S - 1) == ()
    client = it.registry.client("shop", "c1")
    assert client is not None
    assert client.remaining_ms(60 * S) == 10 * S
    assert it.registry.expire(70 * S)
    assert not it.registry.touch("shop", "c1", 70 * S)


def test_a_live_connection_stops_the_lease(it: Watched) -> None:
    it.registry.hold("shop", "c1")
    it.registry.hold("shop", "c1")
    it.register("c1", lease_ms=1000)
    assert it.registry.expire(3600 * S) == ()
    client = it.registry.client("shop", "c1")
    assert client is not None
    assert (client.connections, client.remaining_ms(3600 * S)) == (2, 1000)
    it.registry.release("shop", "c1", 3600 * S)
    assert it.registry.expire(7200 * S) == ()
    it.registry.release("shop", "c1", 7200 * S)
    assert it.registry.expire(7200 * S + 999) == ()
    assert it.registry.expire(7200 * S + 1000) == (Key("shop", "c1"),)
    with pytest.raises(ValueError, match="no live connection"):
        it.registry.release("shop", "c1", 0)


def test_time_in_which_we_did_not_run_is_given_back(it: Watched) -> None:
    it.register("c1")
    it.registry.give_back(100 * S)
    assert it.registry.expire(130 * S - 1) == ()
    assert it.registry.expire(130 * S)


# --- drafts and state -----------------------------------------------------------------------------


def test_a_draft_changes_nothing_until_it_is_adopted(it: Watched) -> None:
    it.register("c1")
    draft = it.registry.draft()
    assert draft.register(parse(doc("c2", sub("h"))), 0).status == 201
    assert draft.register(parse(doc("c3", sub("h", "x"))), 0).status == 409, "with c2 of the draft"
    assert draft.register(parse(doc("c2", sub("h"))), 0).body["registration"] == "same"
    assert draft.remove("shop", "c1").status == 204
    assert draft.remove("shop", "c1").status == 404
    assert draft.register(parse(doc("c4", sub("g", "x"))), 0).status == 201, "c1 is gone in it"
    assert draft.changed
    assert set(it.registry.groups()) == {"g"}
    assert len(it.changes) == 1
    state = draft.state()
    it.registry.adopt(draft, 7 * S)
    assert len(it.changes) == 2, "one change, however many were in it"
    assert it.last.groups == {"g", "h"}
    assert len(it.last.clients) == 3
    assert it.registry.state() == state
    found = it.registry.client("shop", "c2")
    assert found is not None
    assert found.expires_ms == 37 * S


def test_there_and_back_is_no_change(it: Watched) -> None:
    it.register("c1")
    draft = it.registry.draft()
    draft.register(parse(doc("c2")), 0)
    draft.remove("shop", "c2")
    assert not draft.changed
    it.registry.adopt(draft, 0)
    assert len(it.changes) == 1


def test_what_expired_while_a_draft_waited_stays_gone(it: Watched) -> None:
    it.register("c1")
    draft = it.registry.draft()
    draft.register(parse(doc("c2", sub("h"))), 29 * S)
    it.registry.expire(30 * S)
    it.registry.adopt(draft, 31 * S)
    assert set(it.registry.groups()) == {"h"}


def test_state_comes_back_with_full_leases(it: Watched) -> None:
    it.register("c1", pub(), sub(filter="colour=blue", ordered=True), lease_ms=5000)
    it.register("c2", sub("h", mode="broadcast", prefetch=1), topics=[{"name": "t"}])
    state = it.registry.state()
    other = Watched()
    other.registry.restore(decode_state(state), 77 * S)
    assert other.registry.groups() == it.registry.groups()
    assert other.registry.topics() == it.registry.topics()
    assert other.registry.state() == state
    assert not other.changes
    client = other.registry.client("shop", "c1")
    assert client is not None
    assert client.remaining_ms(77 * S) == 5000
    assert other.registry.remove("shop", "c1")
    assert len(other.changes) == 1


@pytest.mark.parametrize(
    "state",
    [
        b"",
        b"[]",
        b"{}",
        b'{"registrations":{}}',
        b'{"registrations":[1]}',
        b'{"registrations":[],"more":1}',
        b'{"registrations":[{"app":"a"}]}',
    ],
)
def test_a_state_that_is_none(state: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode_state(state)


def test_a_state_that_contradicts_itself_is_refused_whole(it: Watched) -> None:
    both = [parse(doc("c1")), parse(doc("c2", sub(topic="x")))]
    with pytest.raises(ValueError, match="topic"):
        it.registry.restore(both, 0)
    with pytest.raises(ValueError, match="stands twice"):
        it.registry.restore([both[0], both[0]], 0)
    assert not it.registry.groups()


# --- against a slow and obvious model -------------------------------------------------------------

GROUPS = st.builds(
    lambda name, role, topic, ordered, prefetch: (
        sub(name, topic, ordered=ordered, prefetch=prefetch)
        if role == "subscribe"
        else pub(name, topic)
    ),
    st.sampled_from("gh"),
    st.sampled_from(["publish", "subscribe"]),
    st.sampled_from(["t", "u"]),
    st.booleans(),
    st.integers(1, 2),
)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["register", "register", "register", "remove", "expire"]),
        st.sampled_from(["c1", "c2", "c3"]),
        st.sampled_from(["a", "a", "b"]),
        st.lists(GROUPS, min_size=1, max_size=2, unique_by=lambda g: (g["name"], g["role"])),
        st.integers(0, 20),
    ),
    max_size=25,
)


def agrees(mine: dict[str, Any], app: str, theirs: dict[str, Any], their_app: str) -> bool:
    if mine["name"] != theirs["name"]:
        return True
    if (app, mine["topic"]) != (their_app, theirs["topic"]):
        return False
    both = mine["role"] == theirs["role"] == "subscribe"
    return not both or mine["ordered"] == theirs["ordered"]


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_any_history_agrees_with_the_model(steps: list[Any]) -> None:
    it = Watched()
    model: dict[Key, tuple[list[dict[str, Any]], int]] = {}
    now_ms = 0
    for verb, client, app, groups, pause_s in steps:
        now_ms += pause_s * S
        key = Key(app, client)
        told = len(it.changes)
        before = {k: v[0] for k, v in model.items()}
        if verb == "remove":
            assert it.registry.remove(app, client) == (model.pop(key, None) is not None)
        elif verb == "expire":
            gone = {k for k, (_, at_ms) in model.items() if at_ms <= now_ms}
            assert set(it.registry.expire(now_ms)) == gone
            model = {k: v for k, v in model.items() if k not in gone}
        else:
            outcome = it.register(client, *groups, app=app, now_ms=now_ms)
            topics = {
                g["name"]: {h["topic"] for h in groups if h["name"] == g["name"]} for g in groups
            }
            right = all(
                agrees(mine, app, theirs, other.app)
                for mine in groups
                for other, (standing, _) in model.items()
                if other != key
                for theirs in standing
            )
            if any(len(t) > 1 for t in topics.values()):
                assert outcome.status == 422
            elif not right:
                assert outcome.status == 409
            else:
                assert outcome.status == (200 if key in model else 201)
                order = sorted(groups, key=lambda g: (g["name"], g["role"]))
                model[key] = (order, now_ms + 30 * S)
        after = {k: v[0] for k, v in model.items()}
        assert len(it.changes) - told == (before != after)
        assert set(it.registry.groups()) == {g["name"] for v in after.values() for g in v}
        for name, group in it.registry.groups().items():
            members = [(k, g) for k, v in after.items() for g in v if g["name"] == name]
            assert {(group.app, group.topic)} == {(k.app, g["topic"]) for k, g in members}
            assert group.publishers == {k.client for k, g in members if g["role"] == "publish"}
            subscribers = [(k, g) for k, g in members if g["role"] == "subscribe"]
            assert group.prefetch == {k.client: g["prefetch"] for k, g in subscribers}
            assert {group.ordered} == {g["ordered"] for _, g in subscribers} or not subscribers
        other = Registry()
        other.restore(decode_state(it.registry.state()), 0)
        assert other.groups() == it.registry.groups()


# --- hand-over ------------------------------------------------------------------------------------


def handed(registry: Registry, now_ms: int) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(registry.save(now_ms)))


def all_of(registry: Registry, now_ms: int) -> Any:
    return (
        registry.state(),
        dict(registry.groups()),
        registry.topics(),
        registry.generation,
        [c.remaining_ms(now_ms) for c in registry.clients()],
    )


@pytest.mark.parametrize("seed", range(20))
def test_a_successor_has_the_same_and_goes_on_the_same(seed: int) -> None:
    chosen = random.Random(seed)
    one, now_ms, shift_ms = Registry(), 10_000_000, chosen.choice([-9_000_000, 0, 777])
    held: Counter[str] = Counter()

    def step(registries: list[tuple[Registry, int]]) -> None:
        nonlocal now_ms
        client, kind = f"c{chosen.randrange(6)}", chosen.randrange(8)
        if kind < 3:
            groups = [
                chosen.choice([pub, sub])(f"g{n}", topic=chosen.choice(["t", "u"]))
                for n in chosen.sample(range(5), chosen.randint(1, 3))
            ]
            lease_ms = chosen.randint(1000, 60_000)
            body = doc(client, *groups, lease_ms=lease_ms)
            assert len({r.register(body, now_ms + by).status for r, by in registries}) == 1
        elif kind == 3:
            assert len({r.remove("shop", client) for r, _ in registries}) == 1
        elif kind == 4:
            held[client] += 1
            for registry, _ in registries:
                registry.hold("shop", client)
        elif kind == 5 and held[client]:
            held[client] -= 1
            for registry, by in registries:
                registry.release("shop", client, now_ms + by)
        else:
            now_ms += chosen.randint(1, 9000)
            assert len({r.expire(now_ms + by) for r, by in registries}) == 1

    for _ in range(chosen.randrange(200)):
        step([(one, 0)])
    two = Registry()
    assert two.inherit(handed(one, now_ms), now_ms + shift_ms) == bool(one.clients())
    for client, connections in held.items():
        for _ in range(connections):
            two.hold("shop", client)
    assert all_of(two, now_ms + shift_ms) == all_of(one, now_ms)
    for _ in range(200):
        step([(one, 0), (two, shift_ms)])
        assert all_of(two, now_ms + shift_ms) == all_of(one, now_ms)


def test_what_stands_already_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Registry()
    for number in range(5):
        one.register(doc(f"c{number}", sub(f"g{number}")), 0)
    two = Registry()
    assert two.inherit(handed(one, 0), 0)
    groups = two.groups()
    one.touch("shop", "c1", 20 * S)
    monkeypatch.setattr("fastmesh.mesh.registration._parsed", None)
    assert not two.inherit(handed(one, 20 * S), 1000 * S)
    assert [c.remaining_ms(1000 * S) for c in two.clients()] == [10 * S, 30 * S, *[10 * S] * 3]
    assert two.groups() == groups
    monkeypatch.undo()
    one.remove("shop", "c0")
    assert two.inherit(handed(one, 20 * S), 1000 * S)
    assert "g0" not in two.groups()


def test_leases_stand_still_and_get_no_longer() -> None:
    registry = Registry()
    registry.register(doc("old"), 0)
    registry.register(doc("new"), 25 * S)
    registry.stood_still(10 * S, 30 * S)  # since 20 s
    remaining = {c.registration.client: c.remaining_ms(30 * S) for c in registry.clients()}
    assert remaining == {"old": 10 * S, "new": 30 * S}


def test_a_registration_of_a_later_version_is_read_without_what_is_new() -> None:
    document = json.loads(doc("c1", sub("g", later=1), later={"a": [1]}))
    data = {"generation": 7, "later": 1, "clients": [{"document": document, "remaining_ms": 5}]}
    registry = Registry()
    assert registry.inherit(msgspec.Raw(json.dumps(data).encode()), 100)
    (client,) = registry.clients()
    assert client.registration == parse(doc("c1", sub("g")))
    assert b"later" not in client.registration.document
    assert (client.expires_ms, registry.generation) == (105, 7)


@pytest.mark.parametrize(
    ("clients", "said"),
    [
        ([{"document": {"app": "a"}}], r"clients\[0\].document"),
        ([{"document": 7}], r"clients\[0\].document"),
        ([{}], "document"),
        ([{"document": {"app": "shop", "client": "a b", "groups": [sub()]}}], "client: 'a b'"),
        ([{"document": json.loads(doc())}] * 2, "stands twice|is registered|differs"),
        ([{"document": json.loads(doc()), "remaining_ms": -1}], ">= 0"),
        (
            [
                {"document": json.loads(doc("c1", sub("g", "t")))},
                {"document": json.loads(doc("c2", sub("g", "u")))},
            ],
            "conflict",
        ),
    ],
)
def test_registrations_that_are_none_change_nothing(clients: Any, said: str) -> None:
    registry = Registry()
    registry.register(doc("before"), 0)
    before = all_of(registry, 0)
    data = msgspec.Raw(json.dumps({"clients": clients, "generation": 99}).encode())
    with pytest.raises(HandoverError, match=said):
        registry.inherit(data, 0)
    assert all_of(registry, 0) == before
