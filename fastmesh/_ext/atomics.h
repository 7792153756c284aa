/* The few memory orders that the planes meet with. Plain loads and stores of aligned words are atomic
 * on every machine we run on; what these add is the order in which the other thread sees them. */
#ifndef FASTMESH_ATOMICS_H
#define FASTMESH_ATOMICS_H
#include <stdint.h>

#define fm_load(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
#define fm_store(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
#define fm_add(p, v) __atomic_add_fetch((p), (v), __ATOMIC_ACQ_REL)
#define fm_exchange(p, v) __atomic_exchange_n((p), (v), __ATOMIC_ACQ_REL)
#define fm_likely(x) __builtin_expect(!!(x), 1)
#define fm_unlikely(x) __builtin_expect(!!(x), 0)

#endif
