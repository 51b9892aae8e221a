package vm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/durable"
)

// Limits of the work on layers.
const (
	layerLimit     = time.Minute // for one look at, or creation of, a layer; an export that does not answer ends here
	maxToolMessage = 8 << 10     // bytes of a tool's complaint that are kept
	maxToolAnswer  = 1 << 20     // bytes of a tool's answer that is read whole
)

// Name is what QEMU's tools call the layer: its path, or an NBD URI.
func (l Layer) Name() string {
	if l.Socket == "" {
		return l.Path
	}
	// QEMU splits the query at & and ; and does not read + as a space.
	escape := func(s string) string { return strings.ReplaceAll(url.QueryEscape(s), "+", "%20") }
	return "nbd+unix:///" + escape(l.Export) + "?socket=" + escape(l.Socket)
}

// check refuses a layer that QEMU's tools would understand in another way than it is meant.
func (l Layer) check() error {
	switch {
	case l.Socket != "" && l.Path != "":
		return fmt.Errorf("layer %s: give a path or a socket, not both", l.Path)
	case l.Socket == "" && !filepath.IsAbs(l.Path):
		// A relative name would be looked for beside the layer above, and one with a colon taken for a protocol.
		return fmt.Errorf("layer %q: give an absolute path", l.Path)
	case l.Socket != "" && !filepath.IsAbs(l.Socket):
		return fmt.Errorf("layer %q on socket %q: give an absolute path", l.Export, l.Socket)
	case l.Format != "raw" && l.Format != "qcow2":
		return fmt.Errorf("layer %s: format %q is neither raw nor qcow2", l.Name(), l.Format)
	}
	return nil
}

// NewLayer makes an empty qcow2 layer at path on top of another layer, as large as that one, and returns it. The layer
// is complete or absent. A file that is already there is never overwritten: the error then is fs.ErrExist. The layer
// below must be readable now: an export must be served; what lies below that one need not be. Only the owner may read
// the new file.
func NewLayer(ctx context.Context, path string, below Layer) (Layer, error) {
	if below.Socket != "" && below.Format == "" {
		below.Format = "raw"
	}
	layer := Layer{Path: path, Format: "qcow2"}
	if err := errors.Join(below.check(), layer.check()); err != nil {
		return Layer{}, fmt.Errorf("create layer: %w", err)
	}
	if _, err := os.Lstat(path); err == nil {
		return Layer{}, fmt.Errorf("create layer %s: remove the old one first: %w", path, fs.ErrExist)
	}
	part, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*.part")
	if err != nil {
		return Layer{}, fmt.Errorf("create layer: %w", err)
	}
	_ = part.Close()
	defer os.Remove(part.Name())

	ctx, cancel := context.WithTimeout(ctx, layerLimit)
	defer cancel()
	// Left to itself the tool opens everything below, where each layer says it is: a delta says where the store's export
	// was when it was made, perhaps on another silo.
	size, err := layerSize(ctx, below)
	if err == nil {
		err = qemuImg(ctx, io.Discard, "create", "-q", "-u", "-f", "qcow2", "-F", below.Format, "-b", below.Name(), part.Name(), strconv.FormatInt(size, 10))
	}
	if err != nil {
		return Layer{}, fmt.Errorf("create layer %s on %s: %w", path, below.Name(), err)
	}
	// Link, unlike rename, refuses to replace a layer that somebody else made meanwhile.
	if err := os.Link(part.Name(), path); err != nil {
		return Layer{}, fmt.Errorf("create layer: %w", err)
	}
	return layer, nil
}

// LayerWritten counts the bytes that were written to a qcow2 layer itself, in whole clusters, without looking below it;
// what was written as zeros or discarded does not count. The layer may be in use, the answer is then a little behind.
func LayerWritten(ctx context.Context, path string) (int64, error) {
	layer := Layer{Path: path, Format: "qcow2"}
	// Without its backing the layer can be read when the export below is not served.
	alone, err := chain([]Layer{layer})
	if err != nil {
		return 0, fmt.Errorf("measure layer %s: %w", path, err)
	}
	ctx, cancel := context.WithTimeout(ctx, layerLimit)
	defer cancel()
	var written int64
	read, write := io.Pipe()
	done := make(chan error, 1)
	go func() {
		err := sumData(read, &written)
		_, _ = io.Copy(io.Discard, read) // so that the tool is never stuck on a full pipe
		done <- err
	}()
	err = qemuImg(ctx, write, "map", "-U", "--output=json", alone)
	_ = write.Close()
	if parse := <-done; err == nil {
		err = parse
	}
	if err != nil {
		return 0, fmt.Errorf("measure layer %s: %w", path, err)
	}
	return written, nil
}

// sumData adds up the extents of a `qemu-img map` that hold data, without keeping the list.
func sumData(r io.Reader, sum *int64) error {
	d := json.NewDecoder(r)
	if _, err := d.Token(); err != nil {
		return fmt.Errorf("read map: %w", err)
	}
	for d.More() {
		var extent struct {
			Length int64 `json:"length"`
			Data   bool  `json:"data"`
		}
		if err := d.Decode(&extent); err != nil {
			return fmt.Errorf("read map: %w", err)
		}
		if extent.Data {
			*sum += extent.Length
		}
	}
	return nil
}

// Detach makes a layer forget where the one below it lies: from then on whoever uses it says so. A delta is fetched from
// the store by silos on which nothing lies there.
func Detach(ctx context.Context, path string) error {
	layer := Layer{Path: path, Format: "qcow2"}
	if err := layer.check(); err != nil {
		return fmt.Errorf("detach layer: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, layerLimit)
	defer cancel()
	if err := qemuImg(ctx, io.Discard, "rebase", "-q", "-u", "-f", "qcow2", "-b", "", path); err != nil {
		return fmt.Errorf("detach layer %s: %w", path, err)
	}
	return nil
}

// chain is what QEMU's tools take in place of a name: each layer, the top first, over the next, wherever the files say
// that they lie.
func chain(layers []Layer) (string, error) {
	var below any
	for _, l := range slices.Backward(layers) {
		if l.Socket != "" && l.Format == "" {
			l.Format = "raw"
		}
		if err := l.check(); err != nil {
			return "", err
		}
		file := map[string]any{"driver": "file", "filename": l.Path}
		if l.Socket != "" {
			file = map[string]any{"driver": "nbd", "server": map[string]any{"type": "unix", "path": l.Socket}, "export": l.Export}
		}
		node := map[string]any{"driver": l.Format, "file": file}
		if l.Format == "qcow2" {
			node["backing"] = below
		}
		below = node
	}
	text, err := json.Marshal(below)
	return "json:" + string(text), err
}

// Flatten writes what a machine would see through the layers, the top first and complete, to a file of its own that needs
// nothing below it: raw if dst ends in .raw or .img, else qcow2; holes stay holes. No machine may be writing to them. dst
// is complete, on stable storage, or absent; a file that is already there is never overwritten (fs.ErrExist). Progress is
// in bytes of the disk.
func Flatten(ctx context.Context, layers []Layer, dst string, report dr.Progress) error {
	if len(layers) == 0 {
		return errors.New("flatten: no layer was given")
	}
	top := layers[0]
	flat := Layer{Path: dst, Format: "qcow2"}
	if ext := filepath.Ext(dst); ext == ".raw" || ext == ".img" {
		flat.Format = "raw"
	}
	from, err := chain(layers)
	if err := errors.Join(err, flat.check()); err != nil {
		return fmt.Errorf("flatten: %w", err)
	}
	if _, err := os.Lstat(dst); err == nil {
		return fmt.Errorf("flatten to %s: remove the old one first: %w", dst, fs.ErrExist)
	}
	size, err := layerSize(ctx, top)
	if err != nil {
		return fmt.Errorf("flatten %s: %w", top.Name(), err)
	}
	part, err := os.CreateTemp(filepath.Dir(dst), "."+filepath.Base(dst)+".*.part")
	if err != nil {
		return fmt.Errorf("flatten: %w", err)
	}
	defer part.Close()
	defer os.Remove(part.Name())

	progress := &percent{size: size, report: report}
	err = qemuImg(ctx, progress, "convert", "-p", "-O", flat.Format, "-t", "writeback", from, part.Name())
	if err != nil {
		return fmt.Errorf("flatten %s: %w", top.Name(), err)
	}
	if err := part.Sync(); err != nil {
		return fmt.Errorf("flatten to %s: %w", dst, err)
	}
	if err := os.Link(part.Name(), dst); err != nil {
		return fmt.Errorf("flatten: %w", err)
	}
	if err := durable.Sync(filepath.Dir(dst)); err != nil {
		return fmt.Errorf("flatten to %s: %w", dst, err)
	}
	report.Report("flatten", size, size, "bytes")
	return nil
}

// layerSize asks how large the disk is that a layer shows.
func layerSize(ctx context.Context, l Layer) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, layerLimit)
	defer cancel()
	var answer bytes.Buffer
	err := qemuImg(ctx, &bounded{Buffer: &answer, max: maxToolAnswer},
		"info", "-U", "--output=json", "-f", l.Format, l.Name())
	if err != nil {
		return 0, err
	}
	var info struct {
		Size int64 `json:"virtual-size"`
	}
	if err := json.Unmarshal(answer.Bytes(), &info); err != nil {
		return 0, fmt.Errorf("read size: %w", err)
	}
	return info.Size, nil
}

// qemuImg runs qemu-img. Its complaint becomes the error.
func qemuImg(ctx context.Context, stdout io.Writer, args ...string) error {
	var complaint bytes.Buffer
	cmd := exec.CommandContext(ctx, "qemu-img", args...)
	cmd.Stdout = stdout
	cmd.Stderr = &bounded{Buffer: &complaint, max: maxToolMessage}
	cmd.WaitDelay = 5 * time.Second
	err := cmd.Run()
	switch {
	case err == nil:
		return nil
	case errors.Is(err, exec.ErrNotFound):
		return fmt.Errorf("qemu-img is not installed (apt install qemu-utils): %w", err)
	case ctx.Err() != nil:
		return fmt.Errorf("qemu-img %s: %w", args[0], ctx.Err())
	}
	said := strings.Join(strings.Fields(complaint.String()), " ")
	if said == "" {
		said = err.Error()
	}
	return fmt.Errorf("qemu-img %s: %s", args[0], strings.TrimPrefix(said, "qemu-img: "))
}

// bounded keeps the first max bytes and swallows the rest.
type bounded struct {
	*bytes.Buffer
	max int
}

func (b *bounded) Write(p []byte) (int, error) {
	if room := b.max - b.Len(); room > 0 {
		b.Buffer.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

// percent turns the progress line of `qemu-img -p`, "    (12.34/100%)\r", into reports.
type percent struct {
	size   int64
	report dr.Progress
	line   []byte
}

func (p *percent) Write(b []byte) (int, error) {
	p.line = append(p.line, b...)
	for {
		line, rest, ended := bytes.Cut(p.line, []byte("\r"))
		if !ended {
			break
		}
		p.line = rest
		text, _, _ := strings.Cut(strings.TrimLeft(string(line), " \n("), "/")
		if share, err := strconv.ParseFloat(text, 64); err == nil {
			p.report.Report("flatten", int64(share/100*float64(p.size)), p.size, "bytes")
		}
	}
	if len(p.line) > maxToolMessage {
		p.line = nil
	}
	return len(b), nil
}
