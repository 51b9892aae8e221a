package boottest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/vm"
)

// Request asks for one boot test.
type Request struct {
	VerdictID   string
	Term        int64 // fencing number of the work
	Snapshot    dr.Snapshot
	PreRecovery dr.PreRecovery
	Checks      []dr.Check
	Objectives  dr.Objectives
	Disks       []vm.Disk  // layers below the scratch layer, top first: the delta over the export
	Network     vm.Network // every NIC is plugged into it: none, or an isolated bridge
	ScratchDir  string     // absolute; holds the machine's folder while it exists
	EvidenceDir string     // made if need be; keeps screenshot.png, serial.log and answers.json
	Limits      Limits
	Asked       time.Time                                                                // when the test was asked for; zero: now
	DiskError   func() error                                                             // see Questions
	NewLayer    func(ctx context.Context, path string, below vm.Layer) (vm.Layer, error) // nil: vm.NewLayer
}

// ownerKind marks a machine as a test's.
const ownerKind = "test"

// MachineName is what the machine of a test is called.
func MachineName(verdictID string) string { return machinePrefix + verdictID }

// Folder is where everything of a test's machine is, and where nothing else is.
func Folder(scratchDir, verdictID string) string { return filepath.Join(scratchDir, verdictID) }

const machinePrefix = "mt-"

const (
	tidyLimit  = 30 * time.Second // to remove a machine and its folder, also when the caller has gone
	maxAnswers = 16 << 20         // bytes of answers.json
)

// Run tests one rescue image. Whatever happens, also when ctx ends, machine and scratch layers are gone afterwards and the
// evidence is kept. What could not be held is a verdict INCONCLUSIVE and no error. An error means that nothing was decided:
// the request is wrong, ctx has ended, or something of the test could not be removed. A test that is run again under the
// same id first removes what the earlier one left.
func Run(ctx context.Context, hv vm.Hypervisor, r Request, report dr.Progress) (verdict dr.Verdict, err error) {
	if err := r.check(); err != nil {
		return dr.Verdict{}, fmt.Errorf("test %s: %w", r.VerdictID, err)
	}
	began := time.Now()
	if r.Asked.IsZero() {
		r.Asked = began
	}
	if err := remove(ctx, hv, r.ScratchDir, r.VerdictID); err != nil {
		return dr.Verdict{}, err
	}
	defer func() {
		tidy, cancel := context.WithTimeout(context.WithoutCancel(ctx), tidyLimit)
		defer cancel()
		err = errors.Join(err, remove(tidy, hv, r.ScratchDir, r.VerdictID))
	}()

	report.Report("assemble", 0, int64(len(r.Disks)), "disks")
	machine, err := r.start(ctx, hv)
	assembled := time.Since(began)
	var a Attendance
	if err == nil {
		a, err = Attend(ctx, machine, r.questions(), report)
	}
	if ctx.Err() != nil {
		return dr.Verdict{}, fmt.Errorf("test %s: %w", r.VerdictID, ctx.Err())
	}
	verdict, err = r.judge(a, err)
	if err != nil {
		return dr.Verdict{}, err
	}
	verdict.Started = began
	verdict.Phases = append([]dr.Phase{{Name: dr.PhaseAssemble, Duration: assembled}}, a.Phases...)
	for _, p := range verdict.Phases {
		verdict.RTA += p.Duration
	}
	// A clock that was set back would make the data younger than it can be.
	verdict.RPA = max(r.Asked.Sub(r.Snapshot.Taken), 0)
	verdict.MeetObjectives(r.Objectives)
	if host, err := hv.Host(ctx); err == nil {
		verdict.Accelerator = host.Accelerator
	}
	serial := ""
	if machine != nil {
		serial = machine.SerialLog()
	}
	verdict.Evidence, err = keep(r.EvidenceDir, serial, verdict, a)
	if err != nil {
		return dr.Verdict{}, fmt.Errorf("test %s: keep evidence: %w", r.VerdictID, err)
	}
	return verdict, nil
}

// check refuses a request that cannot be meant.
func (r Request) check() error {
	if err := dr.ValidateID(r.VerdictID); err != nil {
		return err
	}
	if err := dr.ValidateID(MachineName(r.VerdictID)); err != nil {
		return err
	}
	for what, dir := range map[string]string{"scratch": r.ScratchDir, "evidence": r.EvidenceDir} {
		if !filepath.IsAbs(dir) {
			return fmt.Errorf("%s folder %q: give an absolute path", what, dir)
		}
	}
	if n := len(r.PreRecovery.Hardware.Disks); len(r.Disks) != n || n == 0 {
		return fmt.Errorf("%d disks for hardware of %d", len(r.Disks), n)
	}
	for i, d := range r.Disks {
		if len(d.Layers) == 0 {
			return fmt.Errorf("disk %d has no layer", i)
		}
	}
	for _, c := range r.Checks {
		if err := c.Validate(); err != nil {
			return fmt.Errorf("check: %w", err)
		}
	}
	return nil
}

// start makes the scratch layers and starts the machine. Its errors are ctx's or *Unheld.
func (r Request) start(ctx context.Context, hv vm.Hypervisor) (vm.Machine, error) {
	dir := Folder(r.ScratchDir, r.VerdictID)
	// The emulator runs as another user and has to reach its sockets here; what it may touch is the hypervisor's business.
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, ours("make the machine's folder", err)
	}
	newLayer := r.NewLayer
	if newLayer == nil {
		newLayer = vm.NewLayer
	}
	spec := vm.Spec{
		Name: MachineName(r.VerdictID), Owner: vm.Owner{Kind: ownerKind, ID: r.VerdictID, Term: r.Term},
		Hardware: r.PreRecovery.Hardware, Networks: r.networks(), Dir: dir,
	}
	for i, d := range r.Disks {
		scratch, err := newLayer(ctx, filepath.Join(dir, fmt.Sprintf("scratch%d.qcow2", i)), d.Layers[0])
		if err != nil {
			return nil, ours("make a scratch layer", err)
		}
		spec.Disks = append(spec.Disks, vm.Disk{Scratch: true, Layers: append([]vm.Layer{scratch}, d.Layers...)})
	}
	machine, err := hv.Start(ctx, spec)
	if err != nil {
		return nil, ours("start the machine", err)
	}
	return machine, nil
}

// ours says that our side could not do something.
func ours(what string, err error) *Unheld {
	code := dr.CodeInfrastructure
	if errors.Is(err, vm.ErrCapacity) {
		code = dr.CodeNoCapacity
	}
	return &Unheld{code, what + ": " + err.Error()}
}

func (r Request) networks() []vm.Network {
	out := make([]vm.Network, len(r.PreRecovery.Hardware.NICs))
	for i := range out {
		out[i] = r.Network
	}
	return out
}

func (r Request) questions() Questions {
	return Questions{
		Hardware: r.PreRecovery.Hardware, Networks: r.networks(), PreRecovery: r.PreRecovery,
		Baseline: r.Snapshot.Inventory.Baseline(), SourceBoot: r.Snapshot.Inventory.BootID,
		Checks: r.Checks, Limits: r.Limits, DiskError: r.DiskError,
	}
}

// judge makes a verdict of an attendance and its error. It gives an error only for one that decides nothing.
func (r Request) judge(a Attendance, err error) (dr.Verdict, error) {
	v := dr.Verdict{
		ID: r.VerdictID, SnapshotID: r.Snapshot.ID, PreRecovery: r.PreRecovery.ID, BootID: a.BootID, Results: a.Results,
		Rung: fmt.Sprintf("%s/%s", r.PreRecovery.Hardware.DiskBus, r.PreRecovery.Hardware.NICModel),
	}
	var unheld *Unheld
	switch {
	case errors.As(err, &unheld):
		v.Outcome, v.Code, v.Summary = dr.Inconclusive, unheld.Code, unheld.Reason
	case err != nil:
		return dr.Verdict{}, fmt.Errorf("test %s: %w", r.VerdictID, err)
	default:
		v.Outcome, v.Code, v.Summary = dr.Judge(a.Results)
		if v.Outcome == dr.Pass && a.BootID == "" {
			return dr.Verdict{}, fmt.Errorf("test %s: it passed without an answer to its challenge", r.VerdictID)
		}
		excuse(&v, a.Waited)
	}
	return v, nil
}

// keep writes the evidence. A serial log or screen that there was none of is left out.
func keep(dir, serialLog string, v dr.Verdict, a Attendance) (list []dr.Evidence, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	write := func(kind, name string, content []byte) error {
		path := filepath.Join(dir, name)
		if len(content) == 0 {
			err := os.Remove(path) // of an earlier attempt
			if errors.Is(err, fs.ErrNotExist) {
				err = nil
			}
			return err
		}
		list = append(list, dr.Evidence{Kind: kind, Path: path, Size: int64(len(content))})
		return os.WriteFile(path, content, 0o600)
	}
	var serial []byte
	if serialLog != "" {
		if serial, err = serialTail(serialLog); err != nil {
			serial = []byte("the serial log could not be read: " + err.Error() + "\n")
		}
	}
	answers, err := json.MarshalIndent(struct {
		Verdict    string     `json:"verdict"`
		Outcome    dr.Outcome `json:"outcome"`
		Code       dr.Code    `json:"code,omitempty"`
		Summary    string     `json:"summary"`
		Attendance            // flattened
	}{v.ID, v.Outcome, v.Code, v.Summary, a}, "", " ")
	if err == nil && len(answers) > maxAnswers {
		answers, err = nil, fmt.Errorf("the answers are %d bytes, more than %d", len(answers), maxAnswers)
	}
	err = errors.Join(err, write("screenshot", "screenshot.png", a.Screen), write("serial", "serial.log", serial), write("answers", "answers.json", answers))
	return list, err
}

// Reap removes every machine and folder of a test that is not among the living verdict ids, and names what it removed.
// It is for after a crash: nothing in this process remembers those tests.
func Reap(ctx context.Context, hv vm.Hypervisor, scratchDir string, alive map[string]bool) (removed []string, err error) {
	dead := map[string]bool{}
	machines, err := hv.List(ctx)
	if err != nil {
		return nil, fmt.Errorf("reap tests: %w", err)
	}
	for _, m := range machines {
		if id, ours := strings.CutPrefix(m.Name, machinePrefix); ours && m.Owner.Kind == ownerKind && !alive[id] {
			dead[id] = true
		}
	}
	folders, err := os.ReadDir(scratchDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("reap tests: %w", err)
	}
	for _, f := range folders {
		if id := f.Name(); f.IsDir() && dr.ValidateID(id) == nil && !alive[id] {
			dead[id] = true
		}
	}
	var errs []error
	for id := range dead {
		if err := remove(ctx, hv, scratchDir, id); err != nil {
			errs = append(errs, err)
			continue
		}
		removed = append(removed, id)
	}
	return removed, errors.Join(errs...)
}

// remove removes a test's machine and folder, if they are there.
func remove(ctx context.Context, hv vm.Hypervisor, scratchDir, id string) error {
	m, err := hv.Find(ctx, MachineName(id))
	if err == nil {
		err = m.Destroy(ctx)
	}
	if err != nil && !errors.Is(err, vm.ErrGone) {
		// The folder stays: a machine that may still run has its disks there.
		return fmt.Errorf("remove the machine of test %s: %w", id, err)
	}
	if err := os.RemoveAll(Folder(scratchDir, id)); err != nil {
		return fmt.Errorf("remove the folder of test %s: %w", id, err)
	}
	return nil
}
