package libvirt

import (
	"os"
	"strings"
	"testing"
)

func TestTheProbeTellsAProcessorThatWorksFromOneThatDoesNot(t *testing.T) {
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("needs QEMU: MUSTER_REAL=1")
	}
	emulator, err := findEmulator("")
	if err != nil {
		t.Fatal(err)
	}
	// Emulation always works, so what the probe says of it is said of the probe.
	if said, complaint, err := runProbe(t.Context(), t.TempDir(), emulator, "tcg", "max"); !strings.Contains(said, probeWorks) {
		t.Errorf("a processor that works: %q, %s, %v", said, complaint, err)
	}
	if said, _, _ := runProbe(t.Context(), t.TempDir(), emulator, "tcg", "486"); strings.Contains(said, probeWorks) {
		t.Error("a processor without long mode passed")
	}
}
