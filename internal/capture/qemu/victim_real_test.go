package qemu

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/capture"
	"github.com/musterdr/muster/internal/dr"
)

// victim captures a machine and stops at the first sign of progress, to be killed there. Its first argument is the machine,
// its second the rig's folder. With a third it stops while the machine is frozen.
func victim(ctx context.Context) int {
	src, err := Open(dr.VMSource{Domain: os.Args[1]}, testHost(os.Args[2]))
	if err != nil {
		panic(err)
	}
	if len(os.Args) > 3 {
		m, err := src.look(ctx)
		if err != nil {
			panic(err)
		}
		if f := (&pass{Source: src, m: m}).freeze(ctx); !f.held {
			panic(f.why)
		}
		fmt.Println("frozen")
		select {}
	}
	_, err = capture.Take(ctx, src, shared, api.SnapshotTask{ID: "snap-20260102t030405-victim", Server: dr.Server{ID: "srv-1", Name: "web"}},
		func(part string, _, _ int64, _ string) {
			if strings.HasPrefix(part, "disk ") {
				fmt.Println("reading")
				select {}
			}
		})
	fmt.Println("ended", err)
	return 1
}
