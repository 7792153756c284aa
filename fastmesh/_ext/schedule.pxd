"""The scheduling policy: which node of an application takes a delivery that came from a broker.

Pure: a compiled schedule (Plan, never changed), what one group has seen so far (Share), who can be
reached now, and the message come in; a node goes out. No clock, no allocation, no chance, no Python.

In this order:
  1. This node is not in the schedule: it stays here                                WHY_UNSCHEDULED
  2. The first rule whose matches all hold: one of the rule's nodes that are reachable, by weight;
     this node is one of them while it has a live consumer                          WHY_RULE
  3. This node's share, `weight` percent, stays here                                WHY_SHARE
  4. The rest goes evenly to the reachable nodes of weight 100, this one apart      WHY_SHARE
  In 2 and 4, when nobody is reachable: it stays here                               WHY_NO_PEER

How it is counted, for a group that is not ordered (or a message that has no key):
  3  an accumulator, `weight` hundredths of a message at a time, that starts at half a message: along
     the way never more than half a message off the sum of the weights in force, whatever changes
  4  in turn over a ring that is the nodes in the order of their names' hashes, starting behind this
     node: of two nodes that are reachable throughout neither gets two messages more than the other,
     between any two moments, whoever else comes, goes, joins or is removed meanwhile
  2  each node is owed its part of every message; of those that are owed anything, the one whose
     claim would fall due first (a whole message) gets it: never a whole message off since the rule
     was first used. When somebody comes or goes, what is owed to whom is kept and what was owed to
     the leaver is shared out; whoever would start more than a message off makes all start anew.

For an ordered group the key's hash decides alone, so nothing needs to be remembered:
  3  the fraction of the hash below `weight` percent stays; a change from a to b moves |a - b| percent
  4  rendezvous hashing: a node that leaves moves its own keys only
  2  weighted rendezvous hashing
The hashes are the same on every node, in every process and in every version.
"""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from .frame cimport FrameView
from .push cimport PushFields

cdef enum:
    SCHEDULE_NODES_MAX = 1024   # of an application, as many as a cluster has endpoints
    SCHEDULE_RULES_MAX = 64     # each is tried in turn for every delivery
    SCHEDULE_MATCHES_MAX = 8    # of a rule; each header match is a scan of the header section
    SCHEDULE_TEXT_MAX = 255     # bytes of a name, a header's name or a value
    SCHEDULE_ENTRIES_MAX = 4096  # nodes of all rules together: 16 bytes each here, 5 in each Share
    SCHEDULE_WEIGHT_MAX = 100   # percent
    LOCAL = -1

cdef enum Why:
    WHY_SHARE = 0
    WHY_RULE = 1
    WHY_NO_PEER = 2
    WHY_UNSCHEDULED = 3

cdef enum MatchKind:
    MATCH_COLOUR = 0
    MATCH_LANE = 1
    MATCH_VERSION = 2
    MATCH_KEY = 3
    MATCH_HEADER = 4

cdef struct Match:
    uint8_t kind               # MatchKind
    uint32_t name_size         # MATCH_HEADER: the header's whole name, "h.region"
    uint32_t value_size
    const uint8_t* name
    const uint8_t* value

cdef struct Entry:             # a node of a rule
    uint64_t hash              # of its name
    uint32_t node              # index into the plan's nodes
    uint32_t weight            # 1..100; those of weight 0 are left out when it is compiled

cdef struct Turn:              # one rule
    Match* matches
    Entry* entries             # in ring order
    uint32_t matches_count
    uint32_t entries_count
    uint32_t first             # its first entry's place among the entries of all rules
    uint8_t even               # all weights are equal

cdef struct Plan:              # one block of memory
    uint32_t nodes_count
    # per node: the stable id of the peer's endpoint; 0 = this node, or not dialled: never reachable
    uint32_t* endpoint
    int32_t local              # index of this node, LOCAL = it is not in the schedule
    # the engine needs nothing below
    uint32_t weight            # of this node, percent
    Entry* ring                # the other nodes of weight 100, in ring order
    uint32_t ring_count
    Turn* rules
    uint32_t rules_count
    uint32_t entries_count     # of all rules
    uint64_t origin            # hash of this node's name, where the ring begins
    uint64_t layout            # hash of the rules without their weights: equal = what is owed stays true

cdef struct Share:             # share_size(plan) bytes; owned by the engine, one per group
    uint64_t mark              # set by share_reset
    uint64_t last              # ring distance of the node that was last served in turn
    uint64_t layout
    uint32_t part              # hundredths of a message that are due to this node, 0..99
    uint32_t at                # index into the ring: who is next
    uint32_t rules_count
    uint32_t entries_count
    # then uint32_t total[rules_count]    sum of the weights of who was reachable last time
    #      int32_t owed[entries_count]    messages times `total`
    #      uint8_t here[entries_count]    1 = was reachable last time

cdef size_t share_size(const Plan* plan) noexcept nogil

# Make `share` fit `plan`: whenever the group is given another plan, before the first choice by it.
# Memory that was no Share before must be zero in its first sizeof(Share) bytes: everything starts
# anew. Otherwise (grown with its bytes kept, as realloc does) nothing jumps: this node's part and the
# place in the ring are kept always, what rules owe is kept if the rules differ in weights only, else
# it starts anew.
cdef void share_reset(Share* share, const Plan* plan) noexcept nogil

# What another process's Share of the same group had seen, for one that share_reset has made fit `plan`:
# this node's part and the place in the ring always; what rules owe (arrays as in Share) if it was of
# the same layout and adds up.
cdef void share_restore(Share* share, const Plan* plan, const Share* seen, const uint32_t* total,
                        const int32_t* owed, const uint8_t* here) noexcept nogil
cdef inline uint32_t* totals_of(Share* share) noexcept nogil:
    return <uint32_t*>(<uint8_t*>share + sizeof(Share))

cdef inline int32_t* owed_of(Share* share) noexcept nogil:
    return <int32_t*>(totals_of(share) + share.rules_count)

cdef inline uint8_t* here_of(Share* share) noexcept nogil:
    return <uint8_t*>(owed_of(share) + share.entries_count)

# The index of a node, or LOCAL; the plan's own `local` means the same. `reachable`: one byte per
# node, of this node whether a consumer of the group lives here. `view` is the frame that `fields` was
# read from; its header section is looked into only when a rule asks for a header. Decides and counts:
# call it once per delivery. At most O(nodes).
cdef int32_t schedule_choose(const Plan* plan, Share* share, const FrameView* view, const PushFields* fields,
                             bint ordered, const uint8_t* reachable, uint8_t* why) noexcept nogil

# 64 bits, the same for ever: it decides which node a key lives on.
cdef uint64_t stable_hash(const uint8_t* p, uint32_t n) noexcept nogil
# What rendezvous hashing compares: of a key's hash and a name's hash. The highest wins.
cdef uint64_t stable_mix(uint64_t key, uint64_t name) noexcept nogil

cdef class Schedule:
    cdef Plan* data            # never NULL once made
    cdef readonly str local
    cdef readonly tuple nodes  # names, by index
    cdef object _index
    cdef void _compile(self, list weights, list ring, list turns, endpoints) except *
