package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/api"
)

func filesCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "files SERVER[@SNAPSHOT] ls|find|versions|get|restore", Short: "Look into snapshots: list, search, compare, fetch and put back files",
		Long: `Look into the snapshots of a server without running it. SNAPSHOT is an identifier or "lkg"; without it, it is the newest that can
hold what is asked for.

  ls [PATH]          what is in a folder
  find PATTERN       where a name is, over the whole history
  versions PATH      how one file differed over the history
  get PATH           a file's content, or with --tar a file or folder with everything that Linux keeps of it
  restore PATH...    put files back on the server, or on another one

Of a server that an appliance elsewhere captures, the appliance is asked: its store has the newest. With --far the master looks into
the far store itself.

An image is opened when it is first looked into, which takes about a minute without KVM; what was seen is kept with the snapshot, and
everything after that is answered at once. An image shows its system as that mounts its file systems; what it does not mount
is below /@NAME. A snapshot of data shows the folders that were captured.

In names a backslash, a byte that is no UTF-8 and what cannot be printed are written \\ and \xNN, and may be given so.`,
		Example: `  muster files shop ls /srv
  muster files shop find '*.xls'
  muster files shop versions /srv/budget.xls
  muster files shop@snap-20260101t020000-k3mq2a7x get /srv/budget.xls --to budget-last-week.xls
  muster files shop get /srv --tar --to srv.tar
  muster files shop@lkg restore /srv/budget.xls
  muster files till --far get /srv/budget.xls    # its office burns, or its appliance has let old snapshots go`,
		Args: cobra.MinimumNArgs(2), ValidArgsFunction: completeFiles}
	f := &filesFlags{}
	fl := cmd.Flags()
	fl.BoolVarP(&f.recursive, "recursive", "r", false, "ls: also what is in folders below")
	fl.IntVar(&f.limit, "limit", 0, "ls, find: at most so many names (default 1000)")
	fl.BoolVar(&f.all, "all", false, "find, versions: also images that have not been looked into yet; each takes its time")
	fl.StringVar(&f.to, "to", "", "get: file to write, - for standard output (default: the last name of the path, here)")
	fl.BoolVar(&f.tar, "tar", false, "get: as a tar archive, with owner, mode, times, attributes, links and holes")
	fl.BoolVar(&f.overwrite, "overwrite", false, "get: over a file that is there; restore: also over what is newer")
	fl.BoolVar(&f.far, "far", false, "of a server that an appliance captures: look into the far store, and not into the appliance's; restore: onto a server of the master's own")
	fl.StringVar(&f.toServer, "to-server", "", "restore: on this protected server")
	fl.StringVar(&f.toPath, "to-path", "", "restore: into this folder, which must be there")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		server, snapshot, _ := strings.Cut(args[0], "@")
		verb, rest := args[1], args[2:]
		v, ok := fileVerbs[verb]
		if !ok {
			return withCode(exitUsage, fmt.Errorf("muster files has no %q: use ls, find, versions, get or restore; see 'muster files --help'", verb))
		}
		if len(rest) < v.least || len(rest) > v.most {
			return withCode(exitUsage, fmt.Errorf("muster files %s %s: give %s; see 'muster files --help'", args[0], verb, v.wants))
		}
		for _, name := range []string{"far", "recursive", "limit", "all", "to", "tar", "overwrite", "to-server", "to-path"} {
			if cmd.Flags().Changed(name) && !strings.Contains(" "+v.flags+" ", " "+name+" ") {
				return withCode(exitUsage, fmt.Errorf("muster files %s has no flag --%s; see 'muster files --help'", verb, name))
			}
		}
		if snapshot != "" && (verb == "find" || verb == "versions") {
			return withCode(exitUsage, fmt.Errorf("muster files %s %s looks through the whole history: name the server without @", args[0], verb))
		}
		c := client(cmd)
		defer c.Close()
		defer sayWhyItTakes(cmd)()
		return v.run(cmd, c, f, server, snapshot, rest)
	}
	return cmd
}

type filesFlags struct {
	recursive, all, tar, overwrite, far bool
	limit                               int
	to, toServer, toPath                string
}

// fileVerb is one of the things to be done with files.
type fileVerb struct {
	least, most int
	wants       string
	flags       string
	run         func(cmd *cobra.Command, c *api.Client, f *filesFlags, server, snapshot string, args []string) error
}

var fileVerbs = map[string]fileVerb{
	"ls":       {0, 1, "one path, or none", "far recursive limit", filesList},
	"find":     {1, 1, "one pattern, as '*.xls'", "far all limit", filesFind},
	"versions": {1, 1, "one path", "far all", filesVersions},
	"get":      {1, 1, "one path", "far to tar overwrite", filesGet},
	"restore":  {1, 1000, "1 to 1000 paths", "far overwrite to-server to-path", filesRestore},
}

func completeFiles(cmd *cobra.Command, args []string, toComplete string) ([]string, cobra.ShellCompDirective) {
	switch len(args) {
	case 0:
		return completeServers(cmd, args, toComplete)
	case 1:
		return []string{"ls", "find", "versions", "get", "restore"}, cobra.ShellCompDirectiveNoFileComp
	}
	return nil, cobra.ShellCompDirectiveNoFileComp
}

// patience is how long an answer may take before it is said why.
const patience = 8 * time.Second

// sayWhyItTakes says on standard error, if an answer takes its time, why that is.
func sayWhyItTakes(cmd *cobra.Command) (stop func()) {
	t := time.AfterFunc(patience, func() {
		fmt.Fprintln(cmd.ErrOrStderr(), "muster: still at it; the first look at an image takes about a minute without KVM")
	})
	return func() { t.Stop() }
}

// fileRow is what is shown of a file.
func fileRow(f api.FileInfo) []string {
	letter := map[string]string{"file": "-", "folder": "d", "symlink": "l", "link": "h", "char-device": "c", "block-device": "b", "pipe": "p"}[f.Kind]
	name := f.Path
	if f.Target != "" {
		name += " -> " + f.Target
	}
	modified := "-"
	if !f.Modified.IsZero() {
		modified = when(f.Modified)
	}
	return []string{letter + f.Mode, fmt.Sprintf("%d:%d", f.UID, f.GID), fmt.Sprint(f.Size), modified, name}
}

func filesList(cmd *cobra.Command, c *api.Client, f *filesFlags, server, snapshot string, args []string) error {
	q := api.FilesQuery{Server: server, Snapshot: snapshot, Recursive: f.recursive, Limit: f.limit, Far: f.far}
	if len(args) > 0 {
		q.Path = args[0]
	}
	list, err := c.ListFiles(cmd.Context(), q)
	if err != nil {
		return err
	}
	if wantJSON(cmd) {
		return printJSON(cmd, list)
	}
	kind := "image"
	if list.Data {
		kind = "data"
	}
	fmt.Fprintf(cmd.OutOrStdout(), "%s of %s, %s, %s\n", tame(list.Path), kind, list.Snapshot, when(list.Taken))
	var rows [][]string
	for _, i := range list.Files {
		rows = append(rows, fileRow(i))
	}
	table(cmd.OutOrStdout(), "MODE OWNER SIZE MODIFIED NAME", rows)
	for _, n := range list.Notes {
		fmt.Fprintf(cmd.OutOrStdout(), "note: %s\n", tame(n))
	}
	if list.More {
		fmt.Fprintf(cmd.OutOrStdout(), "There are more: --limit N shows up to 100000.\n")
	}
	return nil
}

func filesFind(cmd *cobra.Command, c *api.Client, f *filesFlags, server, _ string, args []string) error {
	found, err := c.FindFiles(cmd.Context(), api.FindQuery{Server: server, Pattern: args[0], All: f.all, Limit: f.limit, Far: f.far})
	if err != nil {
		return err
	}
	if wantJSON(cmd) {
		return printJSON(cmd, found)
	}
	var rows [][]string
	for _, i := range found.Found {
		rows = append(rows, append([]string{i.Snapshot, when(i.Taken)}, fileRow(i.FileInfo)...))
	}
	if len(rows) == 0 {
		fmt.Fprintf(cmd.OutOrStdout(), "%s is in no snapshot of %s that has been looked into.\n", tame(args[0]), server)
	} else {
		table(cmd.OutOrStdout(), "SNAPSHOT TAKEN MODE OWNER SIZE MODIFIED NAME", rows)
	}
	if found.More {
		fmt.Fprintf(cmd.OutOrStdout(), "There are more: --limit N shows up to 100000.\n")
	}
	unseen(cmd, found.Unseen)
	return nil
}

// unseen says which snapshots have not been looked into.
func unseen(cmd *cobra.Command, ids []string) {
	if n := len(ids); n > 0 {
		fmt.Fprintf(cmd.OutOrStdout(), "Images that have not been looked into: %d; --all opens them, which takes its time.\n", n)
	}
}

func filesVersions(cmd *cobra.Command, c *api.Client, f *filesFlags, server, _ string, args []string) error {
	h, err := c.FileVersions(cmd.Context(), api.VersionsQuery{Server: server, Path: args[0], All: f.all, Far: f.far})
	if err != nil {
		return err
	}
	if wantJSON(cmd) {
		return printJSON(cmd, h)
	}
	var rows [][]string
	for _, v := range h.Versions {
		row := []string{v.Snapshot, when(v.FirstTaken), when(v.Taken), fmt.Sprint(v.Snapshots)}
		if v.File == nil {
			row = append(row, "", "", "", "not there")
		} else {
			row = append(row, fileRow(*v.File)...)
			content := v.File.Content
			row[len(row)-1] = content[:min(len(content), 12)]
		}
		rows = append(rows, row)
	}
	fmt.Fprintln(cmd.OutOrStdout(), tame(h.Path))
	table(cmd.OutOrStdout(), "SNAPSHOT FROM UNTIL SNAPSHOTS MODE OWNER SIZE MODIFIED CONTENT", rows)
	unseen(cmd, h.Unseen)
	return nil
}

func filesGet(cmd *cobra.Command, c *api.Client, f *filesFlags, server, snapshot string, args []string) error {
	q := api.GetQuery{Server: server, Snapshot: snapshot, Path: args[0], Tar: f.tar, Far: f.far}
	if f.to == "-" {
		return c.GetFile(cmd.Context(), q, cmd.OutOrStdout())
	}
	to := f.to
	if to == "" {
		to = filepath.Base(filepath.Clean("/" + args[0]))
		if f.tar {
			to = strings.Trim(to, "/") + ".tar"
		}
		if to == "/" || to == ".tar" {
			return withCode(exitUsage, errors.New("get /: name a file to write with --to"))
		}
	}
	n, err := writeWhole(cmd.Context(), to, f.overwrite, func(ctx context.Context, w io.Writer) error { return c.GetFile(ctx, q, w) })
	if err != nil {
		return err
	}
	if wantJSON(cmd) {
		return printJSON(cmd, map[string]any{"path": args[0], "to": to, "bytes": n})
	}
	fmt.Fprintf(cmd.OutOrStdout(), "%s: %s\n", to, size(n))
	return nil
}

// writeWhole writes a file that is complete or absent, and over none that is there unless it may.
func writeWhole(ctx context.Context, to string, overwrite bool, write func(context.Context, io.Writer) error) (int64, error) {
	if _, err := os.Lstat(to); err == nil && !overwrite {
		return 0, withCode(exitRefused, fmt.Errorf("write %s: it is there already: give --overwrite, or another name with --to", to))
	}
	f, err := os.CreateTemp(filepath.Dir(to), ".muster-get-*")
	if err != nil {
		return 0, fmt.Errorf("write %s: %w", to, err)
	}
	defer os.Remove(f.Name())
	err = write(ctx, f)
	n, _ := f.Seek(0, io.SeekEnd)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return 0, err
	}
	flags := uint(unix.RENAME_NOREPLACE)
	if overwrite {
		flags = 0
	}
	err = unix.Renameat2(unix.AT_FDCWD, f.Name(), unix.AT_FDCWD, to, flags)
	if errors.Is(err, unix.EINVAL) && !overwrite { // a file system that cannot
		err = os.Link(f.Name(), to)
	}
	if errors.Is(err, os.ErrExist) {
		return 0, withCode(exitRefused, fmt.Errorf("write %s: it has come there meanwhile", to))
	}
	if err != nil {
		return 0, fmt.Errorf("write %s: %w", to, err)
	}
	return n, nil
}

func filesRestore(cmd *cobra.Command, c *api.Client, f *filesFlags, server, snapshot string, args []string) error {
	r, err := c.RestoreFiles(cmd.Context(), api.RestoreRequest{Server: server, Snapshot: snapshot, Paths: args, ToServer: f.toServer, ToPath: f.toPath, Overwrite: f.overwrite, By: whoami(), Far: f.far})
	if err != nil {
		return err
	}
	if wantJSON(cmd) {
		if err := printJSON(cmd, r); err != nil {
			return err
		}
	} else {
		printRestored(cmd.OutOrStdout(), r)
	}
	switch {
	case r.Error != "":
		return errors.New(tame(r.Error))
	case r.Failed > 0:
		return errQuiet
	}
	return nil
}

func printRestored(w io.Writer, r api.Restored) {
	var b bytes.Buffer
	for _, f := range r.Files {
		line := fmt.Sprintf("%-9s %s", f.What, f.As)
		if f.Note != "" {
			line += " (" + f.Note + ")"
		}
		fmt.Fprintln(&b, tame(line))
	}
	_, _ = w.Write(b.Bytes())
	fmt.Fprintf(w, "From %s of %s on %s: %d restored, %d replaced, %d beside what is there, %d failed; %s.\n", r.Snapshot, when(r.Taken), r.ToServer,
		r.Restored, r.Replaced, r.Beside, r.Failed, size(r.Bytes))
}
