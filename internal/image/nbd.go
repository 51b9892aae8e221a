package image

import (
	"encoding/binary"
	"errors"
	"fmt"
	"unicode/utf8"
)

// The NBD protocol as far as we speak it. Numbers are big-endian on the wire. See docs/formats/nbd.md.
const (
	magicServer     = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption     = 0x49484156454f5054 // "IHAVEOPT"
	magicOptReply   = 0x0003e889045565a9
	magicRequest    = 0x25609513
	magicSimple     = 0x67446698
	magicStructured = 0x668e33ef

	flagFixedNewstyle = 1 << 0 // of the handshake, both ways
	flagNoZeroes      = 1 << 1

	sendHasFlags  = 1 << 0 // of an export
	sendReadOnly  = 1 << 1
	sendDF        = 1 << 7
	sendMultiConn = 1 << 8
	sendCache     = 1 << 10

	optExportName      = 1
	optAbort           = 2
	optList            = 3
	optInfo            = 6
	optGo              = 7
	optStructuredReply = 8
	optListMeta        = 9
	optSetMeta         = 10

	repAck        = 1
	repServer     = 2
	repInfo       = 3
	repMeta       = 4
	repErrUnsup   = 1<<31 + 1
	repErrInvalid = 1<<31 + 3
	repErrUnknown = 1<<31 + 6
	repErrTooBig  = 1<<31 + 9

	infoExport    = 0
	infoName      = 1
	infoBlockSize = 3

	cmdRead        = 0
	cmdWrite       = 1
	cmdDisconnect  = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdCache       = 5
	cmdWriteZeroes = 6
	cmdBlockStatus = 7

	cmdFlagFUA    = 1 << 0
	cmdFlagDF     = 1 << 2
	cmdFlagReqOne = 1 << 3

	chunkDone = 1 << 0 // flag of the last chunk of a reply

	chunkNone        = 0
	chunkOffsetData  = 1
	chunkOffsetHole  = 2
	chunkBlockStatus = 5
	chunkError       = 1<<15 + 1
	chunkErrorOffset = 1<<15 + 2

	stateHoleAndZero = 1<<0 | 1<<1 // of an extent in base:allocation
	stateZero        = 1 << 1
	stateDirty       = 1 << 0 // of an extent in one of QEMU's dirty bitmaps

	errnoPerm     = 1
	errnoIO       = 5
	errnoInval    = 22
	errnoOverflow = 75

	metaAllocation = "base:allocation"
	metaBitmap     = "qemu:dirty-bitmap:" // and the bitmap's name
	metaID         = 1
)

// Lengths on the wire, in bytes.
const (
	requestSize   = 28
	optionSize    = 16
	optReplySize  = 20 // header of the answer to an option
	greetingSize  = 18
	chunkSize     = 20 // header of a structured chunk
	dataFrameSize = chunkSize + 8
	holeFrameSize = chunkSize + 12
	simpleSize    = 16
)

// request is what a client asks in the transmission phase.
type request struct {
	flags  uint16
	kind   uint16
	cookie uint64
	offset uint64
	length uint32
}

func parseRequest(b *[requestSize]byte) (request, error) {
	if m := binary.BigEndian.Uint32(b[0:]); m != magicRequest {
		return request{}, fmt.Errorf("request begins with %#x", m)
	}
	return request{
		flags:  binary.BigEndian.Uint16(b[4:]),
		kind:   binary.BigEndian.Uint16(b[6:]),
		cookie: binary.BigEndian.Uint64(b[8:]),
		offset: binary.BigEndian.Uint64(b[16:]),
		length: binary.BigEndian.Uint32(b[24:]),
	}, nil
}

func appendRequest(b []byte, r request) []byte {
	b = binary.BigEndian.AppendUint32(b, magicRequest)
	b = binary.BigEndian.AppendUint16(b, r.flags)
	b = binary.BigEndian.AppendUint16(b, r.kind)
	b = binary.BigEndian.AppendUint64(b, r.cookie)
	b = binary.BigEndian.AppendUint64(b, r.offset)
	return binary.BigEndian.AppendUint32(b, r.length)
}

// within says whether the request's range lies inside a disk of that size.
func (r request) within(size int64) bool {
	return r.offset <= uint64(size) && uint64(r.length) <= uint64(size)-r.offset
}

func parseOption(b *[optionSize]byte) (option, length uint32, err error) {
	if m := binary.BigEndian.Uint64(b[0:]); m != magicOption {
		return 0, 0, fmt.Errorf("option begins with %#x", m)
	}
	return binary.BigEndian.Uint32(b[8:]), binary.BigEndian.Uint32(b[12:]), nil
}

func appendOption(b []byte, option uint32, data []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, magicOption)
	b = binary.BigEndian.AppendUint32(b, option)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

// appendText appends a text with its 32-bit length; cutText takes it off again.
func appendText(b []byte, text string) []byte {
	return append(binary.BigEndian.AppendUint32(b, uint32(len(text))), text...)
}

var errOption = errors.New("the option's lengths do not add up")

// cutText takes a text with its 32-bit length off the front.
func cutText(b []byte) (text string, rest []byte, err error) {
	if len(b) < 4 {
		return "", nil, errOption
	}
	n := binary.BigEndian.Uint32(b)
	if uint64(n) > uint64(len(b)-4) {
		return "", nil, errOption
	}
	if text = string(b[4 : 4+n]); !utf8.ValidString(text) {
		return "", nil, errors.New("a name is not UTF-8")
	}
	return text, b[4+n:], nil
}

// parseInfo reads the data of NBD_OPT_INFO and NBD_OPT_GO: an export and what the client wants to know of it.
func parseInfo(b []byte) (name string, wanted []uint16, err error) {
	name, b, err = cutText(b)
	if err != nil {
		return "", nil, err
	}
	if len(b) < 2 || len(b)-2 != 2*int(binary.BigEndian.Uint16(b)) {
		return "", nil, errOption
	}
	for b = b[2:]; len(b) > 0; b = b[2:] {
		wanted = append(wanted, binary.BigEndian.Uint16(b))
	}
	return name, wanted, nil
}

// parseMeta reads the data of NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT.
func parseMeta(b []byte) (name string, queries []string, err error) {
	name, b, err = cutText(b)
	if err != nil {
		return "", nil, err
	}
	if len(b) < 4 {
		return "", nil, errOption
	}
	// A query takes at least four bytes, so the option's own limit bounds the list.
	n := binary.BigEndian.Uint32(b)
	if b = b[4:]; uint64(n) > uint64(len(b)/4) {
		return "", nil, errOption
	}
	for range n {
		var q string
		if q, b, err = cutText(b); err != nil {
			return "", nil, err
		}
		queries = append(queries, q)
	}
	if len(b) > 0 {
		return "", nil, errOption
	}
	return name, queries, nil
}

// appendChunk appends the header of a structured chunk.
func appendChunk(b []byte, flags, kind uint16, cookie uint64, length int) []byte {
	b = binary.BigEndian.AppendUint32(b, magicStructured)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, kind)
	b = binary.BigEndian.AppendUint64(b, cookie)
	return binary.BigEndian.AppendUint32(b, uint32(length))
}

// appendDataFrame appends what comes before the length bytes that were read at off.
func appendDataFrame(b []byte, cookie uint64, off int64, length int) []byte {
	b = appendChunk(b, 0, chunkOffsetData, cookie, 8+length)
	return binary.BigEndian.AppendUint64(b, uint64(off))
}

func appendHoleFrame(b []byte, cookie uint64, off, length int64) []byte {
	b = appendChunk(b, 0, chunkOffsetHole, cookie, 12)
	b = binary.BigEndian.AppendUint64(b, uint64(off))
	return binary.BigEndian.AppendUint32(b, uint32(length))
}

func appendErrorFrame(b []byte, cookie uint64, errno uint32, message string) []byte {
	b = appendChunk(b, 0, chunkError, cookie, 6+len(message))
	b = binary.BigEndian.AppendUint32(b, errno)
	b = binary.BigEndian.AppendUint16(b, uint16(len(message)))
	return append(b, message...)
}

func appendErrorOffsetFrame(b []byte, cookie uint64, errno uint32, message string, off int64) []byte {
	b = appendChunk(b, 0, chunkErrorOffset, cookie, 14+len(message))
	b = binary.BigEndian.AppendUint32(b, errno)
	b = binary.BigEndian.AppendUint16(b, uint16(len(message)))
	b = append(b, message...)
	return binary.BigEndian.AppendUint64(b, uint64(off))
}

func appendSimple(b []byte, cookie uint64, errno uint32) []byte {
	b = binary.BigEndian.AppendUint32(b, magicSimple)
	b = binary.BigEndian.AppendUint32(b, errno)
	return binary.BigEndian.AppendUint64(b, cookie)
}

func appendOptReply(b []byte, option, kind uint32, data ...[]byte) []byte {
	n := 0
	for _, d := range data {
		n += len(d)
	}
	b = binary.BigEndian.AppendUint64(b, magicOptReply)
	b = binary.BigEndian.AppendUint32(b, option)
	b = binary.BigEndian.AppendUint32(b, kind)
	b = binary.BigEndian.AppendUint32(b, uint32(n))
	for _, d := range data {
		b = append(b, d...)
	}
	return b
}
