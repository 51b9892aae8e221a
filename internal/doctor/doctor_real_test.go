package doctor

import (
	"os"
	"testing"
)

func TestThisHostIsExamined(t *testing.T) {
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("needs QEMU: set MUSTER_REAL=1")
	}
	for _, f := range Examine(t.Context(), Patient{Data: t.TempDir()}) {
		t.Logf("%-5s %-22s %s  [%s]", f.State, f.Name, f.Detail, f.Fix)
		if f.State == fail && (f.Name == "qemu" || f.Name == "qemu-img" || f.Name == "libguestfs" || f.Name == "kernel for libguestfs") {
			t.Errorf("this host runs the real tests, so it has %s", f.Name)
		}
	}
}
