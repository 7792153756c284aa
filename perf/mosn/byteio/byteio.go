// Package byteio has the two types that MOSN's seata filter uses: big-endian 32-bit numbers over a stream.
package byteio

import (
	"encoding/binary"
	"io"
)

type BigEndianWriter struct{ io.Writer }

func (w *BigEndianWriter) WriteUint32(v uint32) (int, error) {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], v)
	return w.Write(b[:])
}

type BigEndianReader struct{ io.Reader }

func (r *BigEndianReader) ReadUint32() (uint32, int, error) {
	var b [4]byte
	n, err := io.ReadFull(r.Reader, b[:])
	return binary.BigEndian.Uint32(b[:]), n, err
}
