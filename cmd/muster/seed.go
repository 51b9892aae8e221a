package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/store"
)

func applianceSeedCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "seed", Short: "Carry a first copy to the master on a disk"}
	cmd.AddCommand(seedExportCommand())
	return cmd
}

func masterSeedCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "seed", Short: "Take in a first copy that was carried here on a disk"}
	cmd.AddCommand(seedImportCommand())
	return cmd
}

func seedExportCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "export DIR [SERVER…]", Short: "Write what the newest snapshots need onto a disk, sealed", Args: cobra.MinimumNArgs(1),
		Long: `Write the blocks of the newest snapshot of each server, or of the servers named, into a folder of a disk that is carried to the master.
They are sealed: who finds the disk can read nothing of it. Each is read back from the disk and compared. Run it again if it was cut off:
what is there and right is not written again.

Tell the digest that it ends with to whoever takes the disk in, by another way than the disk: with it nobody can change what is on the
disk unseen. 'muster appliance serve' may go on meanwhile, and sends afterwards only what the disk does not have.`,
		Example: "  muster appliance seed export /media/usb/acme\n  muster appliance seed export /media/usb/acme till office-files"}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		i := installation(cmd)
		set, err := i.applianceSettings()
		if err != nil {
			return err
		}
		dir, err := filepath.Abs(args[0])
		if err != nil {
			return err
		}
		password, err := i.password()
		if err != nil {
			return withCode(exitUnavailable, err)
		}
		st, err := store.Open(cmd.Context(), set.nearStore(), password)
		if errors.Is(err, store.ErrNotAStore) {
			return withCode(exitUnavailable, fmt.Errorf("there is no near store yet in %s: start 'muster appliance serve' first", set.Near))
		}
		if err != nil {
			return fmt.Errorf("open near store: %w", err)
		}
		defer st.Close(context.WithoutCancel(cmd.Context())) //nolint:errcheck // only read
		ids, err := newestOf(cmd.Context(), st, args[1:])
		if err != nil {
			return err
		}
		show := seedProgress(cmd)
		seed, err := st.ExportSeed(cmd.Context(), dir, ids, show.report)
		show.end()
		if err != nil {
			return err
		}
		if wantJSON(cmd) {
			return printJSON(cmd, seedShown{Dir: dir, Snapshots: seed.Snapshots, Packs: seed.Packs, New: seed.New, Bytes: seed.Bytes, Digest: seed.Digest})
		}
		fmt.Fprintf(cmd.OutOrStdout(), "%d packs of %d snapshots, %s, are in %s; %d were written now.\nOn the master: muster master seed import DIR --customer CUSTOMER --digest %s\n",
			seed.Packs, len(ids), size(seed.Bytes), dir, seed.New, seed.Digest)
		return nil
	}
	return cmd
}

// seedShown is a seed for programs.
type seedShown struct {
	Dir       string   `json:"dir"`
	Snapshots []string `json:"snapshots"`
	Packs     int64    `json:"packs"`
	New       int64    `json:"new"`
	Bytes     int64    `json:"bytes"`
	Digest    string   `json:"digest"`
}

// newestOf gives the newest image of each server, and the newest data with the image that it goes onto. No names: all servers.
func newestOf(ctx context.Context, st *store.Store, names []string) ([]string, error) {
	all, err := st.Snapshots(ctx)
	if err != nil {
		return nil, err
	}
	type key struct {
		server string
		data   bool
	}
	newest, known := map[key]dr.Snapshot{}, map[string]bool{}
	for _, s := range all { // oldest first
		newest[key{s.Server, s.IsData()}] = s
		known[s.Server] = true
	}
	wanted := map[string]bool{}
	for _, name := range names {
		if !known[name] {
			return nil, withCode(exitNotFound, fmt.Errorf("the near store has no snapshot of server %q: see 'muster appliance status'", name))
		}
		wanted[name] = true
	}
	seen := map[string]bool{}
	var ids []string
	add := func(id string) {
		if !seen[id] {
			seen[id] = true
			ids = append(ids, id)
		}
	}
	for k, s := range newest {
		if len(names) == 0 || wanted[k.server] {
			add(s.ImageID())
			add(s.ID)
		}
	}
	if len(ids) == 0 {
		return nil, withCode(exitNotFound, errors.New("the near store has no snapshot yet: see 'muster appliance status'"))
	}
	return ids, nil
}

func seedImportCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "import DIR --customer NAME --digest HEX", Short: "Add what a disk carries to a customer's far store", Args: cobra.ExactArgs(1),
		Long: `Add what 'muster appliance seed export' wrote onto a disk to the far store of a customer. Every block is compared with the list on the
disk, and the list with the digest that the export ended with; each is read back from the store. Nothing there is replaced. It
needs no key, and 'muster serve' may run meanwhile. Run it again if it was cut off.`,
		Example: "  muster master seed import /media/usb/acme --customer acme --digest 5f2a…"}
	customer := cmd.Flags().String("customer", "", "whose far store it is")
	digest := cmd.Flags().String("digest", "", "what 'muster appliance seed export' ended with")
	_ = cmd.MarkFlagRequired("customer")
	_ = cmd.MarkFlagRequired("digest")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		dir, err := filepath.Abs(args[0])
		if err != nil {
			return err
		}
		driver, err := installation(cmd).farDriverOf(cmd, *customer)
		if err != nil {
			return err
		}
		show := seedProgress(cmd)
		seed, err := store.ImportSeed(cmd.Context(), driver, dir, *digest, show.report)
		show.end()
		if errors.Is(err, store.ErrSeed) || errors.Is(err, store.ErrDamaged) {
			return withCode(exitDamaged, err)
		}
		if err != nil {
			return err
		}
		if wantJSON(cmd) {
			return printJSON(cmd, seedShown{Dir: dir, Snapshots: seed.Snapshots, Packs: seed.Packs, New: seed.New, Bytes: seed.Bytes, Digest: seed.Digest})
		}
		fmt.Fprintf(cmd.OutOrStdout(), "%d packs, %s, are in %s; %d were new. The appliance sends only the rest now.\n", seed.Packs, size(seed.Bytes), driver, seed.New)
		return nil
	}
	return cmd
}

// showing shows how far work of this process is.
type showing struct{ *progress }

func seedProgress(cmd *cobra.Command) showing { return showing{progressOn(cmd)} }

func (s showing) report(part string, done, total int64, unit string) {
	s.update(api.Operation{Step: part, Done: done, Total: total, Unit: unit})
}
