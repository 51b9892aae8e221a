package libvirt

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"image"
	"image/png"
	"io"
)

const (
	maxSide    = 8192     // pixels of a screen's width and height
	maxPicture = 64 << 20 // bytes of what libvirt sends; the guest chooses how large its screen is
)

// picture takes in what libvirt sends. It swallows what is too much: a stream whose writer fails locks up the client.
type picture struct {
	bytes.Buffer
	lost bool
}

func (p *picture) Write(b []byte) (int, error) {
	if p.lost || p.Len()+len(b) > maxPicture {
		p.lost = true
		return len(b), nil
	}
	return p.Buffer.Write(b)
}

// encodePicture turns what libvirt sent, a portable pixmap or a PNG, into PNG.
func encodePicture(mime string, p *picture) ([]byte, error) {
	if p.lost {
		return nil, fmt.Errorf("the screen is larger than %d bytes", maxPicture)
	}
	var screen image.Image
	var err error
	switch mime {
	case "image/x-portable-pixmap":
		screen, err = decodePixmap(&p.Buffer)
	case "image/png":
		var config image.Config
		if config, err = png.DecodeConfig(bytes.NewReader(p.Bytes())); err == nil && max(config.Width, config.Height) > maxSide {
			err = fmt.Errorf("a screen of %d×%d", config.Width, config.Height)
		}
		if err == nil {
			screen, err = png.Decode(&p.Buffer)
		}
	default:
		err = fmt.Errorf("a picture of unknown kind %q", mime)
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
