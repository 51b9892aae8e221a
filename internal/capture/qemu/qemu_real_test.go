package qemu

import (
	"testing"

	"github.com/musterdr/muster/internal/capture/capturetest"
)

func TestARunningMachine(t *testing.T) {
	real(t)
	capturetest.Run(t, func(t *testing.T) *capturetest.Bench { return newRig(t, "qcow2", "qcow2").start(t).bench(true) })
}

func TestARunningMachineWithARawDisk(t *testing.T) {
	real(t)
	capturetest.Run(t, func(t *testing.T) *capturetest.Bench { return newRig(t, "qcow2", "raw").start(t).bench(false) })
}

func TestAMachineThatIsShutOff(t *testing.T) {
	real(t)
	capturetest.Run(t, func(t *testing.T) *capturetest.Bench { return newRig(t, "qcow2", "raw").bench(false) })
}
