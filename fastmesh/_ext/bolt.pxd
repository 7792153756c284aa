"""SOFA Bolt v1 and v2 frames (wire facts: sofa-bolt 1.6.12, sofa-bolt-node 2.0.1, mosn 1.6.1, all
big-endian).

Common: proto u8 (1|2), [v2: ver1 u8], type u8 (0 response, 1 request, 2 oneway), cmdcode u16 (0
heartbeat, 1 rpc
request, 2 rpc response, 100 goaway), ver2 u8, requestId u32, codec u8, [v2: switch u8, legal
0..127, bit 0 = CRC],
requests: timeout i32 ms (<= 0 none) | responses: status u16, classLen i16 (legal 0..0x7fff: Java
reads it signed), headerLen
i16 (same), contentLen i32 (0..limit), class, headers, content, [v2 with ver1 >= 2 and switch bit 0:
CRC-32 of all before it].

v1 header: request 22, response 20 bytes. v2: 24 and 22. Headers: (i32 keyLen, key, i32 valueLen,
value)*, -1 = null.
"""

from libc.stdint cimport uint8_t, uint32_t

from .frame cimport Codec

cdef Codec BOLT
