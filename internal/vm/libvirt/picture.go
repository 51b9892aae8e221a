package libvirt

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"image"
	"image/png"
	"io"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"time"
)

const (
	maxSide    = 8192     // pixels of a screen's width and height
	maxPicture = 64 << 20 // bytes of a screen; the guest chooses how large it is
)

// photograph has virsh write a machine's screen into a pipe and returns it as PNG.
func (h *Hypervisor) photograph(ctx context.Context, domain string) ([]byte, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	uri := "qemu+unix:///system?socket=" + url.QueryEscape(h.config.Socket)
	cmd := exec.CommandContext(ctx, "virsh", "-q", "-c", uri, "screenshot", domain, "/dev/fd/3")
	cmd.ExtraFiles = []*os.File{w} // its number 3
	cmd.WaitDelay = time.Second
	var complaint bytes.Buffer
	cmd.Stderr = &complaint
	if err := cmd.Start(); err != nil {
		_ = w.Close()
		if errors.Is(err, exec.ErrNotFound) {
			err = fmt.Errorf("virsh is not installed (apt install libvirt-clients): %w", err)
		}
		return nil, err
	}
	_ = w.Close()
	data, err := io.ReadAll(io.LimitReader(r, maxPicture+1))
	if len(data) > maxPicture {
		err = fmt.Errorf("the screen is larger than %d bytes", maxPicture)
	}
	_ = r.Close() // should virsh have more to write, it ends here
	if ended := cmd.Wait(); err == nil && ended != nil {
		err = errors.New(strings.Join(strings.Fields(complaint.String()), " "))
	}
	if err != nil {
		return nil, err
	}
	return encodePicture(data)
}

// encodePicture turns what libvirt gives, a portable pixmap or with newer QEMU a PNG, into PNG.
func encodePicture(data []byte) ([]byte, error) {
	var screen image.Image
	var err error
	if bytes.HasPrefix(data, []byte("\x89PNG")) {
		var config image.Config
		if config, err = png.DecodeConfig(bytes.NewReader(data)); err == nil && max(config.Width, config.Height) > maxSide {
			err = fmt.Errorf("a screen of %d×%d", config.Width, config.Height)
		}
		if err == nil {
			screen, err = png.Decode(bytes.NewReader(data))
		}
	} else {
		screen, err = decodePixmap(bytes.NewReader(data))
	}
	if err != nil {
		return nil, fmt.Errorf("read picture: %w", err)
	}
	var out bytes.Buffer
	if err := png.Encode(&out, screen); err != nil {
		return nil, fmt.Errorf("write picture: %w", err)
	}
	return out.Bytes(), nil
}

// decodePixmap reads a binary portable pixmap (P6) of 8 bits a colour, the only kind QEMU makes.
func decodePixmap(r io.Reader) (image.Image, error) {
	in := bufio.NewReader(r)
	var magic string
	var width, height, colours int
	if _, err := fmt.Fscanf(in, "%2s", &magic); err != nil || magic != "P6" {
		return nil, errors.New("not a binary pixmap")
	}
	if _, err := fmt.Fscan(in, &width, &height, &colours); err != nil {
		return nil, fmt.Errorf("pixmap's header: %w", err)
	}
	if width < 1 || height < 1 || width > maxSide || height > maxSide || colours != 255 {
		return nil, fmt.Errorf("a pixmap of %d×%d with %d colours", width, height, colours)
	}
	if _, err := in.ReadByte(); err != nil { // the one blank after the header
		return nil, fmt.Errorf("pixmap's header: %w", err)
	}
	screen := image.NewNRGBA(image.Rect(0, 0, width, height))
	row := make([]byte, 3*width)
	for y := range height {
		if _, err := io.ReadFull(in, row); err != nil {
			return nil, fmt.Errorf("pixmap's row %d: %w", y, err)
		}
		for x := range width {
			i := screen.PixOffset(x, y)
			copy(screen.Pix[i:i+3], row[3*x:])
			screen.Pix[i+3] = 255
		}
	}
	return screen, nil
}
