"""The scheduling policy (contract: schedule.pxd): compiled by Python, asked by the engine for every
delivery that comes from a broker.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.math cimport log
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc

from .bolt cimport BOLT
from .bytes cimport memcmp, memcpy, memset, put32
from .debug cimport holds
from .frame cimport FRAME_REQUEST, FrameView, Span
from .push cimport PushFields, push_read

from time import perf_counter_ns

from .push import CLASS

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>

    /* The finalizer of MurmurHash3: every bit of the input changes half of the output's. */
    static inline uint64_t fm_finish(uint64_t h) {
        h ^= h >> 33; h *= 0xff51afd7ed558ccdULL;
        h ^= h >> 33; h *= 0xc4ceb9fe1a85ec53ULL;
        return h ^ (h >> 33);
    }
    static inline uint64_t fm_little(const uint8_t *p, uint32_t n) {
        uint64_t v = 0;
        memcpy(&v, p, n);
    #if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        v = __builtin_bswap64(v);
    #endif
        return v;
    }
    /* Eight bytes at a time, the last ones filled up with zeros (the length tells them apart). */
    static uint64_t fm_stable_hash(const uint8_t *p, uint32_t n) {
        uint64_t h = 0x9e3779b97f4a7c15ULL ^ n;
        for (; n > 8; p += 8, n -= 8) {
            h = (h ^ fm_little(p, 8)) * 0xd6e8feb86659fd93ULL;
            h ^= h >> 32;
        }
        return fm_finish((h ^ fm_little(p, n)) * 0xd6e8feb86659fd93ULL);
    }
    """
    uint64_t finish "fm_finish"(uint64_t h) noexcept nogil
    uint64_t hash_of "fm_stable_hash"(const uint8_t* p, uint32_t n) noexcept nogil

cdef enum:
    HALF = 50            # hundredths of a message: where a share starts
    WHOLE = 100

cdef uint64_t MARK = 0x736861726573312e  # a Share that share_reset has seen


# --- hashes ---------------------------------------------------------------------------------------


cdef uint64_t stable_hash(const uint8_t* p, uint32_t n) noexcept nogil:
    return hash_of(p, n)


cdef uint64_t stable_mix(uint64_t key, uint64_t name) noexcept nogil:
    return finish(key ^ name)


# --- what a group has seen ------------------------------------------------------------------------


cdef size_t share_size(const Plan* plan) noexcept nogil:
    return sizeof(Share) + 4 * <size_t>plan.rules_count + 5 * <size_t>plan.entries_count


cdef void share_reset(Share* share, const Plan* plan) noexcept nogil:
    cdef uint32_t low = 0, high = plan.ring_count, middle
    if share.mark != MARK:
        memset(share, 0, sizeof(Share))
        share.mark = MARK
        share.part = HALF
        share.layout = ~plan.layout
    if (share.layout != plan.layout or share.rules_count != plan.rules_count
            or share.entries_count != plan.entries_count):
        memset(<uint8_t*>share + sizeof(Share), 0, share_size(plan) - sizeof(Share))
        share.layout = plan.layout
        share.rules_count = plan.rules_count
        share.entries_count = plan.entries_count
    # Whoever follows the one that was served last is next, whether that one is still there or not.
    while low < high:
        middle = (low + high) // 2
        if plan.ring[middle].hash - plan.origin > share.last:
            high = middle
        else:
            low = middle + 1
    share.at = low if low < plan.ring_count else 0


cdef bint adds_up(const Plan* plan, const uint32_t* total, const int32_t* owed, const uint8_t* here) noexcept nogil:
    cdef uint32_t i, j, at
    cdef int64_t sum
    for i in range(plan.rules_count):
        sum = 0
        if total[i] > plan.rules[i].entries_count * SCHEDULE_WEIGHT_MAX:
            return False
        for j in range(plan.rules[i].entries_count):
            at = plan.rules[i].first + j
            if here[at] > 1 or (owed[at] and not here[at]):
                return False
            if owed[at] > <int64_t>total[i] or owed[at] < -<int64_t>total[i]:
                return False
            sum += owed[at]
        if sum:
            return False
    return True


cdef void share_restore(Share* share, const Plan* plan, const Share* seen, const uint32_t* total,
                        const int32_t* owed, const uint8_t* here) noexcept nogil:
    share.part = seen.part % WHOLE
    share.last = seen.last
    if (seen.layout == plan.layout and seen.rules_count == plan.rules_count
            and seen.entries_count == plan.entries_count and adds_up(plan, total, owed, here)):
        memcpy(totals_of(share), total, plan.rules_count * sizeof(uint32_t))
        memcpy(owed_of(share), owed, plan.entries_count * sizeof(int32_t))
        memcpy(here_of(share), here, plan.entries_count)
    share_reset(share, plan)        # who is next in this plan's ring


# --- the choice -----------------------------------------------------------------------------------


cdef inline bint equal(const Span* found, const Match* match) noexcept nogil:
    return (found.at != NULL and found.size == match.value_size
            and memcmp(found.at, match.value, match.value_size) == 0)


cdef bint match_holds(const Turn* turn, const FrameView* view, const PushFields* fields) noexcept nogil:
    cdef const Match* match
    cdef Span found
    cdef uint32_t i
    for i in range(turn.matches_count):
        match = &turn.matches[i]
        if match.kind == MATCH_COLOUR:
            found = fields.colour
        elif match.kind == MATCH_LANE:
            found = fields.lane
        elif match.kind == MATCH_VERSION:
            found = fields.version
        elif match.kind == MATCH_KEY:
            found = fields.key
        elif BOLT.header(view, match.name, match.name_size, &found) != 1:
            return False  # malformed, too: the engine has judged the frame before it asks here
        if not equal(&found, match):
            return False
    return True


cdef inline bint is_here(const Plan* plan, const Entry* entry, const uint8_t* reachable) noexcept nogil:
    return reachable[entry.node] and (plan.endpoint[entry.node] != 0 or <int32_t>entry.node == plan.local)


cdef inline int64_t floored(int64_t a, int64_t b) noexcept nogil:
    """a / b towards minus infinity, b > 0."""
    cdef int64_t q = a // b
    return q - 1 if a % b < 0 else q


cdef void settle(const Turn* turn, int32_t* owed, uint8_t* here, uint32_t old, uint32_t new,
                 const Plan* plan, const uint8_t* reachable) noexcept nogil:
    """Somebody came or went, or a weight changed: the same claims in units of the new total.

    What is owed in all must stay zero: what was owed to leavers is shared out by weight, what the
    rounding leaves goes to the first ones, a unit each.
    """
    cdef int64_t left = 0, sum = 0, claim
    cdef bint anew = old == 0
    cdef uint32_t i
    for i in range(turn.entries_count):
        if not is_here(plan, &turn.entries[i], reachable):
            owed[i] = 0
            here[i] = 0
        elif not here[i]:
            owed[i] = 0
            here[i] = 1
        left += owed[i]
    for i in range(turn.entries_count):
        if here[i] and not anew:
            claim = floored(owed[i] * <int64_t>new - left * turn.entries[i].weight, old)
            sum += claim
            if claim > new or claim < -<int64_t>new:
                anew = True
                break
            owed[i] = <int32_t>claim
    for i in range(turn.entries_count):
        if anew:
            owed[i] = 0
        elif here[i] and sum < 0:
            owed[i] += 1
            sum += 1
    holds(anew or sum == 0)


cdef int32_t rule_in_turn(const Plan* plan, const Turn* turn, uint32_t number, Share* share,
                          const uint8_t* reachable) noexcept nogil:
    cdef int32_t* owed = owed_of(share) + turn.first
    cdef uint8_t* here = here_of(share) + turn.first
    cdef uint32_t* known = totals_of(share) + number
    cdef const Entry* entries = turn.entries
    cdef uint32_t total = 0, i
    cdef bint changed = False
    cdef int32_t best = -1
    for i in range(turn.entries_count):
        if is_here(plan, &entries[i], reachable):
            total += entries[i].weight
            changed |= not here[i]
        else:
            changed |= here[i]
    if total == 0:
        return -1
    if changed or total != known[0]:
        settle(turn, owed, here, known[0], total, plan, reachable)
        known[0] = total
    for i in range(turn.entries_count):
        if not here[i]:
            continue
        owed[i] += <int32_t>entries[i].weight
        # Who is owed nothing yet waits. Of the others the one whose claim would grow to a whole
        # message first: the least (total - owed) / weight.
        if owed[i] > 0 and (best < 0 or (<int64_t>total - owed[i]) * entries[best].weight
                            < (<int64_t>total - owed[best]) * entries[i].weight):
            best = <int32_t>i
    holds(best >= 0)
    owed[best] -= <int32_t>total
    return <int32_t>entries[best].node


cdef int32_t rule_by_key(const Plan* plan, const Turn* turn, uint64_t hash, const uint8_t* reachable) noexcept nogil:
    """Each node draws an exponential time at the rate of its weight; the earliest wins."""
    cdef const Entry* entry
    cdef uint64_t mixed, highest = 0
    cdef double time, earliest = 0
    cdef int32_t best = -1
    cdef uint32_t i
    for i in range(turn.entries_count):
        entry = &turn.entries[i]
        if not is_here(plan, entry, reachable):
            continue
        mixed = stable_mix(hash, entry.hash)
        if turn.even:
            if best < 0 or mixed > highest:
                highest = mixed
                best = <int32_t>entry.node
            continue
        # 53 bits and a half, so that it is neither 0 nor 1
        time = -log((<double>(mixed >> 11) + 0.5) * (1.0 / 9007199254740992.0)) / entry.weight
        if best < 0 or time < earliest:
            earliest = time
            best = <int32_t>entry.node
    return best


cdef int32_t ring_in_turn(const Plan* plan, Share* share, const uint8_t* reachable) noexcept nogil:
    cdef uint32_t at = share.at
    cdef uint32_t _
    cdef const Entry* entry
    for _ in range(plan.ring_count):
        entry = &plan.ring[at]
        at += 1
        if at == plan.ring_count:
            at = 0
        if is_here(plan, entry, reachable):
            share.at = at
            share.last = entry.hash - plan.origin
            return <int32_t>entry.node
    return -1


cdef int32_t ring_by_key(const Plan* plan, uint64_t hash, const uint8_t* reachable) noexcept nogil:
    cdef uint64_t mixed, highest = 0
    cdef int32_t best = -1
    cdef uint32_t i
    for i in range(plan.ring_count):
        if is_here(plan, &plan.ring[i], reachable):
            mixed = stable_mix(hash, plan.ring[i].hash)
            if best < 0 or mixed > highest:
                highest = mixed
                best = <int32_t>plan.ring[i].node
    return best


cdef int32_t schedule_choose(const Plan* plan, Share* share, const FrameView* view, const PushFields* fields,
                             bint ordered, const uint8_t* reachable, uint8_t* why) noexcept nogil:
    cdef bint keyed = ordered and fields.key.at != NULL
    cdef uint64_t hash = 0
    cdef int32_t node
    cdef uint32_t i
    if plan.local < 0:
        why[0] = WHY_UNSCHEDULED
        return LOCAL
    if keyed:
        hash = stable_hash(fields.key.at, fields.key.size)
    for i in range(plan.rules_count):
        if match_holds(&plan.rules[i], view, fields):
            if keyed:
                node = rule_by_key(plan, &plan.rules[i], hash, reachable)
            else:
                node = rule_in_turn(plan, &plan.rules[i], i, share, reachable)
            why[0] = WHY_RULE if node >= 0 else WHY_NO_PEER
            return node if node >= 0 else <int32_t>LOCAL
    why[0] = WHY_SHARE
    if keyed:
        if ((hash >> 32) * WHOLE) >> 32 < plan.weight:
            return plan.local
        node = ring_by_key(plan, hash, reachable)
    else:
        share.part += plan.weight
        if share.part >= WHOLE:
            share.part -= WHOLE
            return plan.local
        node = ring_in_turn(plan, share, reachable)
    if node < 0:
        why[0] = WHY_NO_PEER
        return LOCAL
    return node


# --- compiling ------------------------------------------------------------------------------------

MATCH_KINDS = {
    "colour": MATCH_COLOUR, "lane": MATCH_LANE, "version": MATCH_VERSION, "key": MATCH_KEY,
}
WHY = ("share", "rule", "no_peer", "unscheduled")
NODES_MAX = SCHEDULE_NODES_MAX
RULES_MAX = SCHEDULE_RULES_MAX
MATCHES_MAX = SCHEDULE_MATCHES_MAX
TEXT_MAX = SCHEDULE_TEXT_MAX
ENTRIES_MAX = SCHEDULE_ENTRIES_MAX
WEIGHT_MAX = SCHEDULE_WEIGHT_MAX


cdef bytes a_text(str where, value, low):
    if not isinstance(value, str):
        raise ValueError(f"{where}: {value!r} is not text")
    cdef bytes data = value.encode()
    if not low <= len(data) <= TEXT_MAX:
        raise ValueError(f"{where}: {len(data)} bytes; it must have {low}..{TEXT_MAX}")
    return data


cdef uint32_t a_number(str where, value, high) except? 0xffffffff:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= high:
        raise ValueError(f"{where}: {value!r}; it must be a whole number 0..{high}")
    return <uint32_t>value


cdef int at_most(str where, values, most) except -1:
    if len(values) > most:
        raise ValueError(f"{where}: {len(values)} are too many; there may be {most}")
    return 0


cdef uint64_t bytes_hash(bytes data) noexcept:
    return stable_hash(<const uint8_t*>PyBytes_AS_STRING(data), <uint32_t>PyBytes_GET_SIZE(data))


cdef list checked_weights(str where, pairs, names):
    """[(index, hash, weight)] of (name, weight) pairs; each name once and in `names`."""
    found = []
    seen = set()
    for number, (name, weight) in enumerate(pairs):
        at = f"{where}[{number}]"
        if name not in names:
            raise ValueError(f"{at}: {name!r} is not a node of the schedule")
        if name in seen:
            raise ValueError(f"{at}: {name!r} is there twice")
        seen.add(name)
        found.append((names[name], bytes_hash(name.encode()), a_number(at, weight, WEIGHT_MAX)))
    return found


cdef list in_ring_order(list entries, uint64_t origin):
    return sorted(entries, key=lambda e: ((e[1] - origin) & 0xffffffffffffffff, e[0]))


cdef void put_entries(Entry* out, list entries) noexcept:
    cdef uint32_t i = 0
    for node, hash, weight in entries:
        out[i].hash = hash
        out[i].node = node
        out[i].weight = weight
        i += 1


cdef inline uint64_t step(uint64_t hash, bytes text) noexcept:
    """One more text of a list into its hash."""
    return finish(hash * 31 + bytes_hash(text))


cdef class Schedule:
    def __cinit__(self, nodes, *, rules=(), local, endpoints):
        cdef dict index = {}
        cdef list weights = []
        cdef list turns = []
        cdef uint64_t layout = 0
        at_most("nodes", nodes, NODES_MAX)
        at_most("rules", rules, RULES_MAX)
        for number, (name, weight) in enumerate(nodes):
            a_text(f"nodes[{number}]", name, 1)
            if name in index:
                raise ValueError(f"nodes[{number}]: {name!r} is there twice")
            index[name] = number
            weights.append(a_number(f"nodes[{number}]", weight, WEIGHT_MAX))
        self.local = local
        self.nodes = tuple(index)
        self._index = index
        cdef uint64_t origin = bytes_hash(a_text("local", local, 1))
        for name, endpoint in endpoints.items():
            if name not in index:
                raise ValueError(f"endpoints: {name!r} is not a node of the schedule")
            a_number(f"endpoints[{name!r}]", endpoint, 0xffffffff)
        ring = in_ring_order([
            (i, bytes_hash(name.encode()), <int>WHOLE)
            for name, i in index.items() if weights[i] == WHOLE and name != local
        ], origin)
        for number, (matches, chosen) in enumerate(rules):
            where = f"rules[{number}]"
            at_most(f"{where}.matches", matches, MATCHES_MAX)
            if not matches:
                raise ValueError(f"{where}.matches: is empty; a rule asks for at least one")
            checked = []
            for name, value in matches:
                if name not in MATCH_KINDS and not (isinstance(name, str) and name.startswith("h.")):
                    known = ", ".join(MATCH_KINDS)
                    raise ValueError(f"{where}.matches: {name!r}; it must be one of {known}, h.<header>")
                key = a_text(f"{where}.matches", name, 3)
                text = a_text(f"{where}.matches", value, 0)
                checked.append((name, key, text))
                layout = step(step(layout, key), text)
            entries = in_ring_order(
                [e for e in checked_weights(f"{where}.nodes", chosen, index) if e[2]], origin
            )
            for node, _, _ in entries:
                layout = step(layout, self.nodes[node].encode())
            layout = step(layout, b"\0rule")
            turns.append((checked, entries))
        self._compile(weights, ring, turns, endpoints)
        self.data.origin = origin
        self.data.layout = layout

    cdef void _compile(self, list weights, list ring, list turns, endpoints) except *:
        """Everything in one block, the widest first, so that all of it is aligned."""
        cdef size_t entries_count = sum([len(entries) for _, entries in turns])
        cdef size_t matches_count = sum([len(matches) for matches, _ in turns])
        cdef size_t texts = sum([len(m[1]) + len(m[2]) for matches, _ in turns for m in matches])
        cdef size_t size
        cdef uint8_t* at
        cdef Plan* plan
        cdef Turn* turn
        cdef Match* match
        cdef Entry* entry
        if entries_count > SCHEDULE_ENTRIES_MAX:
            raise ValueError(f"rules: {entries_count} nodes in all are too many; there may be {ENTRIES_MAX}")
        size = (sizeof(Plan) + (len(ring) + entries_count) * sizeof(Entry) + len(turns) * sizeof(Turn)
                + matches_count * sizeof(Match) + len(weights) * sizeof(uint32_t) + texts)
        plan = <Plan*>calloc(1, size)
        if plan == NULL:
            raise MemoryError
        self.data = plan
        at = <uint8_t*>plan + sizeof(Plan)
        plan.ring = <Entry*>at
        plan.ring_count = <uint32_t>len(ring)
        put_entries(plan.ring, ring)
        entry = plan.ring + plan.ring_count
        plan.entries_count = <uint32_t>entries_count
        plan.rules = <Turn*>(entry + entries_count)
        plan.rules_count = <uint32_t>len(turns)
        match = <Match*>(plan.rules + plan.rules_count)
        plan.endpoint = <uint32_t*>(match + matches_count)
        plan.nodes_count = <uint32_t>len(weights)
        for name, endpoint in endpoints.items():
            plan.endpoint[<uint32_t>self._index[name]] = endpoint
        plan.local = self._index.get(self.local, LOCAL)
        if plan.local >= 0:
            plan.weight = weights[plan.local]
        at = <uint8_t*>(plan.endpoint + plan.nodes_count)
        turn = plan.rules
        for matches, entries in turns:
            turn.matches = match
            turn.matches_count = <uint32_t>len(matches)
            for name, key, value in matches:
                match.kind = MATCH_KINDS.get(name, MATCH_HEADER)
                match.name = at
                match.name_size = <uint32_t>len(key)
                memcpy(at, PyBytes_AS_STRING(key), match.name_size)
                at += match.name_size
                match.value = at
                match.value_size = <uint32_t>len(value)
                memcpy(at, PyBytes_AS_STRING(value), match.value_size)
                at += match.value_size
                match += 1
            turn.entries = entry
            turn.entries_count = <uint32_t>len(entries)
            turn.first = <uint32_t>(entry - plan.ring) - plan.ring_count
            turn.even = len({weight for _, _, weight in entries}) <= 1
            put_entries(entry, entries)
            entry += turn.entries_count
            turn += 1
        holds(at == <uint8_t*>plan + size)

    def __dealloc__(self):
        free(self.data)

    def choose(self, GroupShare share not None, Message message not None, bytes reachable not None, *,
               bint ordered=False):
        cdef uint8_t why = 0
        cdef int32_t node
        if PyBytes_GET_SIZE(reachable) != <Py_ssize_t>self.data.nodes_count:
            raise ValueError(f"reachable: {len(reachable)} bytes; it must have {self.data.nodes_count}")
        if share._schedule is not self:
            raise ValueError("share: belongs to another schedule; reset it with this one first")
        node = schedule_choose(self.data, share._share, &message._view, &message._fields, ordered,
                               <const uint8_t*>PyBytes_AS_STRING(reachable), &why)
        return node, why

    def bench(self, Message message not None, bytes reachable not None, int rounds, *, bint ordered=False):
        cdef GroupShare share = GroupShare(self)
        cdef const uint8_t* here = <const uint8_t*>PyBytes_AS_STRING(reachable)
        cdef int64_t sum = 0
        cdef uint8_t why = 0
        cdef int _
        self.choose(share, message, reachable, ordered=ordered)
        start = perf_counter_ns()
        with nogil:
            for _ in range(rounds):
                sum += schedule_choose(self.data, share._share, &message._view, &message._fields, ordered,
                                       here, &why)
        end = perf_counter_ns()
        # The sum is looked at, so that nothing of the loop can be left out.
        return (end - start) / rounds if sum >= -rounds else 0.0


cdef class GroupShare:
    cdef Share* _share
    cdef Schedule _schedule

    def __cinit__(self, Schedule schedule not None):
        self.reset(schedule)

    def __dealloc__(self):
        free(self._share)

    def reset(self, Schedule schedule not None):
        cdef size_t size = share_size(schedule.data)
        cdef size_t old
        cdef Share* share = <Share*>malloc(size)
        if share == NULL:
            raise MemoryError
        memset(share, 0, sizeof(Share))
        if self._share != NULL:
            old = share_size(self._schedule.data)
            memcpy(share, self._share, min(size, old))
            free(self._share)
        self._share = share
        self._schedule = schedule
        share_reset(share, schedule.data)

    @property
    def part(self):
        return self._share.part

    def owed(self, uint32_t rule):
        cdef const Turn* turn
        if rule >= self._schedule.data.rules_count:
            raise ValueError(f"rule: {rule}; there are {self._schedule.data.rules_count}")
        turn = &self._schedule.data.rules[rule]
        names = self._schedule.nodes
        return totals_of(self._share)[rule], {
            names[turn.entries[i].node]: owed_of(self._share)[turn.first + i]
            for i in range(turn.entries_count) if here_of(self._share)[turn.first + i]
        }


cdef class Message:
    cdef FrameView _view
    cdef PushFields _fields
    cdef bytes _data

    def __cinit__(self, headers):
        cdef uint8_t[4] length
        data = bytearray(CLASS)
        for pair in ({"fm.op": "deliver"} | dict(headers)).items():
            for text in pair:
                encoded = text.encode()
                put32(length, <uint32_t>len(encoded))
                data += (<char*>length)[:4]
                data += encoded
        self._data = bytes(data)
        self._view.kind = FRAME_REQUEST
        self._view.data = <uint8_t*>PyBytes_AS_STRING(self._data)
        self._view.size = <uint32_t>len(data)
        self._view.class_size = self._view.headers_at = <uint32_t>len(CLASS)
        self._view.headers_size = self._view.size - self._view.headers_at
        if push_read(&self._view, &self._fields) != 1:
            raise ValueError(f"headers: {headers!r} make no delivery")


def hash_bytes(bytes data not None):
    return bytes_hash(data)


def mix(uint64_t key, uint64_t name):
    return stable_mix(key, name)
