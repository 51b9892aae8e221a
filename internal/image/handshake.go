package image

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"sort"
	"strings"
	"time"
)

// Limits of the handshake.
const (
	maxOptions = 128      // of one client
	maxOption  = 16 << 10 // bytes of one option's data that are read; nothing we speak needs a quarter of it
	maxSkip    = 1 << 20  // bytes of one option's data that are skipped; more closes the connection
)

var errAborted = errors.New("the client aborted")

// handshake agrees on an export with the client. All of it happens on one goroutine, with little memory.
func (c *client) handshake() error {
	_ = c.conn.SetDeadline(time.Now().Add(c.server.HandshakeLimit))
	hello := binary.BigEndian.AppendUint64(nil, magicServer)
	hello = binary.BigEndian.AppendUint64(hello, magicOption)
	hello = binary.BigEndian.AppendUint16(hello, flagFixedNewstyle|flagNoZeroes)
	if _, err := c.conn.Write(hello); err != nil {
		return err
	}
	var b [4]byte
	if _, err := io.ReadFull(c.in, b[:]); err != nil {
		return err
	}
	flags := binary.BigEndian.Uint32(b[:])
	if flags&^uint32(flagFixedNewstyle|flagNoZeroes) != 0 {
		return fmt.Errorf("unknown flags %#x", flags)
	}
	for range maxOptions {
		chosen, err := c.option(flags)
		if chosen || err != nil {
			return err
		}
	}
	return fmt.Errorf("more than %d options", maxOptions)
}

// option reads and answers one option, and says whether it was the one that ends the handshake.
func (c *client) option(flags uint32) (chosen bool, err error) {
	var head [optionSize]byte
	if _, err := io.ReadFull(c.in, head[:]); err != nil {
		return false, err
	}
	option, length, err := parseOption(&head)
	if err != nil {
		return false, err
	}
	if length > maxSkip {
		return false, fmt.Errorf("option of %d bytes", length)
	}
	if length > maxOption {
		if _, err := c.in.Discard(int(length)); err != nil {
			return false, err
		}
		if option == optExportName {
			return false, errors.New("the export name is too long")
		}
		return false, c.reply(option, repErrTooBig, fmt.Sprintf("the limit is %d bytes", maxOption))
	}
	data := make([]byte, length)
	if _, err := io.ReadFull(c.in, data); err != nil {
		return false, err
	}
	switch option {
	case optExportName:
		return true, c.exportName(string(data), flags)
	case optAbort:
		_ = c.reply(option, repAck, "")
		return false, errAborted
	case optList:
		return false, c.list(data)
	case optInfo, optGo:
		return c.info(option, data)
	case optStructuredReply:
		if len(data) > 0 {
			return false, c.reply(option, repErrInvalid, "this option has no data")
		}
		c.structured = true
		return false, c.reply(option, repAck, "")
	case optListMeta, optSetMeta:
		return false, c.metaContext(option, data)
	}
	return false, c.reply(option, repErrUnsup, "")
}

// reply answers an option with one text, which for an error is what people read.
func (c *client) reply(option, kind uint32, text string) error {
	_, err := c.conn.Write(appendOptReply(nil, option, kind, []byte(text)))
	return err
}

// choose takes the export that the client wants to use, and ends the time limit of the handshake.
func (c *client) choose(name string) *export {
	s := c.server
	s.mu.Lock()
	defer s.mu.Unlock()
	x := s.find(name)
	if x == nil || s.closed || c.leaving {
		return nil
	}
	c.export = x
	x.clients[c] = struct{}{}
	c.meta = c.metaFor != nil && *c.metaFor == name
	_ = c.conn.SetReadDeadline(time.Time{}) // a client may be idle for as long as it likes
	_ = c.conn.SetWriteDeadline(time.Now().Add(s.StallLimit))
	return x
}

// exportName is the old way to choose. It has no answer for an error but to hang up.
func (c *client) exportName(name string, flags uint32) error {
	x := c.choose(name)
	if x == nil {
		return fmt.Errorf("there is no export %.100q", name)
	}
	b := binary.BigEndian.AppendUint64(nil, uint64(x.size))
	b = binary.BigEndian.AppendUint16(b, x.flags(c.structured))
	if flags&flagNoZeroes == 0 {
		b = append(b, make([]byte, 124)...)
	}
	_, err := c.conn.Write(b)
	return err
}

// list names all exports.
func (c *client) list(data []byte) error {
	if len(data) > 0 {
		return c.reply(optList, repErrInvalid, "this option has no data")
	}
	c.server.mu.Lock()
	names := make([]string, 0, len(c.server.exports))
	for name := range c.server.exports {
		names = append(names, name)
	}
	c.server.mu.Unlock()
	sort.Strings(names)
	for _, name := range names {
		length := binary.BigEndian.AppendUint32(nil, uint32(len(name)))
		if _, err := c.conn.Write(appendOptReply(nil, optList, repServer, length, []byte(name))); err != nil {
			return err
		}
	}
	return c.reply(optList, repAck, "")
}

// info tells what an export is like and, for NBD_OPT_GO, chooses it.
func (c *client) info(option uint32, data []byte) (chosen bool, err error) {
	name, wanted, err := parseInfo(data)
	if err != nil {
		return false, c.reply(option, repErrInvalid, err.Error())
	}
	var x *export
	if option == optGo {
		x = c.choose(name)
	} else {
		c.server.mu.Lock()
		x = c.server.find(name)
		c.server.mu.Unlock()
	}
	if x == nil {
		return false, c.reply(option, repErrUnknown, "there is no export of that name")
	}
	told := binary.BigEndian.AppendUint16(nil, infoExport)
	told = binary.BigEndian.AppendUint64(told, uint64(x.size))
	told = binary.BigEndian.AppendUint16(told, x.flags(c.structured))
	b := appendOptReply(nil, option, repInfo, told)

	told = binary.BigEndian.AppendUint16(nil, infoBlockSize)
	told = binary.BigEndian.AppendUint32(told, 1)          // smallest
	told = binary.BigEndian.AppendUint32(told, 4<<10)      // preferred
	told = binary.BigEndian.AppendUint32(told, MaxRequest) // largest
	b = appendOptReply(b, option, repInfo, told)

	if slices.Contains(wanted, infoName) {
		told = binary.BigEndian.AppendUint16(nil, infoName)
		b = appendOptReply(b, option, repInfo, append(told, x.name...))
	}
	b = appendOptReply(b, option, repAck)
	_, err = c.conn.Write(b)
	return option == optGo, err
}

// metaContext lists or chooses what block status can be asked of; we know base:allocation only.
func (c *client) metaContext(option uint32, data []byte) error {
	name, queries, err := parseMeta(data)
	if err != nil {
		return c.reply(option, repErrInvalid, err.Error())
	}
	if !c.structured {
		return c.reply(option, repErrInvalid, "structured replies come first")
	}
	c.server.mu.Lock()
	x := c.server.find(name)
	c.server.mu.Unlock()
	if option == optSetMeta {
		c.metaFor = nil // whatever comes of it, the earlier choice is void
	}
	if x == nil {
		return c.reply(option, repErrUnknown, "there is no export of that name")
	}
	match := slices.Contains(queries, metaAllocation)
	if option == optListMeta {
		match = match || len(queries) == 0 || slices.Contains(queries, strings.TrimSuffix(metaAllocation, "allocation"))
	}
	if match {
		id := uint32(0)
		if option == optSetMeta {
			c.metaFor = &name
			id = metaID
		}
		b := binary.BigEndian.AppendUint32(nil, id)
		b = appendOptReply(nil, option, repMeta, append(b, metaAllocation...))
		if _, err := c.conn.Write(b); err != nil {
			return err
		}
	}
	return c.reply(option, repAck, "")
}
