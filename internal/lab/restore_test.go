package lab

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
)

// read gives a file of a live server, or why there is none.
func (l *Lab) read(host, name string) string {
	b, err := os.ReadFile(filepath.Join(l.path(host), name))
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// place says what became of a name, and where it lies.
func placed(r api.Restored, path string) string {
	for _, f := range r.Files {
		if f.Path == path {
			return f.What + " " + f.As
		}
	}
	return "nothing"
}

func TestAFileIsFoundInTheHistoryAndPutBack(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("only root may give files to others")
	}
	l := liveShop(t)
	top := l.path("web")
	old := time.Now().Add(-48 * time.Hour).Truncate(time.Second)
	l.put(t, "web", "srv/budget.xls", "last week's")
	l.put(t, "web", "srv/deep/er/x", "x")
	for _, err := range []error{os.Chown(top+"/srv/budget.xls", 1000, 1001), os.Chmod(top+"/srv/budget.xls", 0o640), os.Link(top+"/srv/budget.xls", top+"/srv/same"),
		unix.Lsetxattr(top+"/srv/budget.xls", "user.color", []byte("red\x00"), 0), os.Symlink("nowhere", top+"/srv/link"), os.Chown(top+"/srv/deep", 1234, 4321),
		syscall.Chmod(top+"/srv/deep", 0o2750), os.Chtimes(top+"/srv/budget.xls", old, old), os.Chtimes(top+"/srv/deep", old, old)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	first := l.snapshot(t)
	l.put(t, "web", "srv/budget.xls", "this week's")
	second := l.data(t, "shop")

	history, err := l.FileVersions(ctx, api.VersionsQuery{Server: "shop", Path: "/srv/budget.xls"})
	if err != nil || len(history.Versions) != 2 || history.Versions[1].Snapshot != first.Snapshot.ID || history.Versions[0].File.Content == history.Versions[1].File.Content || len(history.Unseen) != 1 {
		t.Fatalf("%+v, %v", history, err)
	}
	found, err := l.FindFiles(ctx, api.FindQuery{Server: "shop", Pattern: "budget.*"})
	if err != nil || len(found.Found) != 2 || found.Found[0].Snapshot != second.Snapshot.ID {
		t.Errorf("found %+v, %v", found, err)
	}
	listing, err := l.ListFiles(ctx, api.FilesQuery{Server: "shop", Path: "/srv"})
	if err != nil || len(listing.Files) != 5 || listing.Files[0].Path != "/srv/budget.xls" || listing.Files[0].Mode != "0640" {
		t.Errorf("%+v, %v", listing, err)
	}
	var got bytes.Buffer
	if err := l.GetFile(ctx, api.GetQuery{Server: "shop", Snapshot: first.Snapshot.ID, Path: "/srv/same"}, &got); err != nil || got.String() != "last week's" {
		t.Errorf("%q, %v", got.String(), err)
	}
	if err := l.GetFile(ctx, api.GetQuery{Server: "shop", Path: "/srv/none"}, &got); api.KindOf(err) != api.NotFound {
		t.Error(err)
	}

	// What is there is newer, and stays.
	was := api.RestoreRequest{Server: "shop", Snapshot: first.Snapshot.ID, Paths: []string{"/srv/budget.xls", "/srv/deep"}}
	if err := os.RemoveAll(top + "/srv/deep"); err != nil {
		t.Fatal(err)
	}
	r, err := l.RestoreFiles(ctx, was)
	beside := "/srv/budget.xls.restored-" + first.Snapshot.Taken.UTC().Format("20060102T150405Z")
	if err != nil || placed(r, "/srv/budget.xls") != "beside "+beside || l.read("web", "srv/budget.xls") != "this week's" || l.read("web", beside) != "last week's" ||
		r.Restored != 3 || r.Failed != 0 {
		t.Fatalf("%+v, %v", r, err)
	}
	var st syscall.Stat_t
	value := make([]byte, 10)
	n, xerr := unix.Lgetxattr(top+beside, "user.color", value)
	if err := syscall.Lstat(top+beside, &st); err != nil || st.Uid != 1000 || st.Gid != 1001 || st.Mode&0o7777 != 0o640 || st.Mtim.Sec != old.Unix() || string(value[:max(n, 0)]) != "red\x00" {
		t.Errorf("%+v %q, %v, %v", st, value, err, xerr)
	}
	if err := syscall.Lstat(top+"/srv/deep", &st); err != nil || st.Uid != 1234 || st.Gid != 4321 || st.Mode&0o7777 != 0o2750 || st.Mtim.Sec != old.Unix() || l.read("web", "srv/deep/er/x") != "x" {
		t.Errorf("%+v, %v", st, err)
	}
	if r, err = l.RestoreFiles(ctx, was); err != nil || placed(r, "/srv/budget.xls") != "beside "+beside+"-2" || placed(r, "/srv/deep/er/x") != "replaced /srv/deep/er/x" || placed(r, "/srv/deep") != "there /srv/deep" {
		t.Errorf("%+v, %v", r, err)
	}
	was.Overwrite = true
	if r, err = l.RestoreFiles(ctx, was); err != nil || placed(r, "/srv/budget.xls") != "replaced /srv/budget.xls" || l.read("web", "srv/budget.xls") != "last week's" {
		t.Errorf("%+v, %v", r, err)
	}

	// On another server, which is named by the request alone; links stay links of each other.
	if _, err := l.AddServer(ctx, dr.Server{Name: "spare", Source: live0("spare"), Schedule: dr.Schedule{Every: 24 * time.Hour}}); err != nil {
		t.Fatal(err)
	}
	l.put(t, "spare", "mnt/x", "x")
	whole := api.RestoreRequest{Server: "shop", Snapshot: first.Snapshot.ID, Paths: []string{"/srv"}, ToServer: "spare", ToPath: "/mnt"}
	if r, err = l.RestoreFiles(ctx, whole); err != nil || r.Failed != 0 || l.read("spare", "mnt/srv/deep/er/x") != "x" || l.read("spare", "mnt/srv/same") != "last week's" {
		t.Errorf("%+v, %v", r, err)
	}
	if err := syscall.Lstat(l.path("spare")+"/mnt/srv/same", &st); err != nil || st.Nlink != 2 {
		t.Errorf("%d names, %v", st.Nlink, err)
	}
	for name, bad := range map[string]api.RestoreRequest{
		"no folder":       {Server: "shop", Paths: []string{"/srv/same"}, ToPath: "/nowhere"},
		"not its own":     {Server: "shop", Paths: []string{"/srv/same"}, ToServer: "spare"},
		"climbs":          {Server: "shop", Paths: []string{"/srv/../etc/shadow"}},
		"everything":      {Server: "shop", Paths: []string{"/"}},
		"no such server":  {Server: "shop", Paths: []string{"/srv/same"}, ToServer: "none", ToPath: "/mnt"},
		"not captured":    {Server: "shop", Snapshot: first.Snapshot.ID, Paths: []string{"/etc/passwd"}},
		"no such file":    {Server: "shop", Snapshot: first.Snapshot.ID, Paths: []string{"/srv/none"}},
		"nothing is said": {Server: "shop"},
	} {
		if r, err := l.RestoreFiles(ctx, bad); err == nil && r.Failed == 0 && r.Error == "" {
			t.Errorf("%s: %+v", name, r)
		}
	}
	for _, host := range []string{"web", "spare"} {
		_ = filepath.WalkDir(l.path(host), func(path string, _ os.DirEntry, err error) error {
			if strings.Contains(path, ".muster-restore") {
				t.Errorf("left behind: %s", path)
			}
			return err
		})
	}
}

func TestNobodyIsLedOutOfTheFolderInWhichFilesArePutBack(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("only root may give files to others")
	}
	l := liveShop(t)
	l.put(t, "web", "srv/conf/passwd", "evil")
	l.snapshot(t)
	l.put(t, "web", "etc/passwd", "good")
	top := l.path("web")
	if err := os.RemoveAll(top + "/srv/conf"); err != nil {
		t.Fatal(err)
	}
	for name, target := range map[string]string{"conf": "../etc", "page": "../etc/passwd"} {
		os.Remove(top + "/srv/" + name)
		if err := os.Symlink(target, top+"/srv/"+name); err != nil {
			t.Fatal(err)
		}
	}
	r, err := l.RestoreFiles(ctx, api.RestoreRequest{Server: "shop", Paths: []string{"/srv"}, Overwrite: true})
	if err != nil || r.Failed != 2 || placed(r, "/srv/page") != "replaced /srv/page" || l.read("web", "etc/passwd") != "good" || l.read("web", "srv/page") != "first" {
		t.Errorf("%+v, %v", r, err)
	}
	if !slices.ContainsFunc(r.Files, func(f api.RestoredFile) bool {
		return f.Path == "/srv/conf/passwd" && f.What == "failed" && strings.Contains(f.Note, "link")
	}) {
		t.Errorf("%+v", r.Files)
	}
}

// restores gives the events about files that were put back.
func (l *Lab) restores(t *testing.T) (messages []string) {
	t.Helper()
	all, err := l.Events(ctx, 0, 0, "")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range all {
		if e.Kind == dr.FilesRestored {
			messages = append(messages, e.Server+": "+e.Message)
		}
	}
	return messages
}

func TestWhoPutFilesBackIsAnEventAlsoIfNoMasterWasThere(t *testing.T) {
	t.Parallel()
	l := liveShop(t)
	first := l.snapshot(t)
	id := first.Snapshot.ID
	ask := api.RestoreRequest{Server: "shop", Paths: []string{"/srv/page"}, Overwrite: true, By: "anna"}
	if _, err := l.RestoreFiles(ctx, ask); err != nil {
		t.Fatal(err)
	}
	want := []string{"shop: anna put /srv/page of shop, as in " + id + ", back onto shop: 0 restored, 1 replaced, 0 beside what is there, 0 failed; 5 bytes"}
	if got := l.restores(t); !slices.Equal(got, want) {
		t.Fatalf("%q, want %q", got, want)
	}

	l.Appliance.Journal = nil // the master is gone
	ask.By, ask.Paths, ask.ToPath = "bert", []string{"/srv"}, "/nowhere"
	if r, err := l.Appliance.RestoreFiles(ctx, ask); err != nil || r.Failed == 0 {
		t.Fatalf("%+v, %v", r, err)
	}
	died := dr.FileRestore{ID: dr.NewID("restore"), By: "carl", Began: l.Clock.Now(), Snapshot: id, Server: "shop", ToServer: "shop", ToID: first.Snapshot.ServerID, Path: "/srv", Paths: 2}
	if err := l.Store.PutRecord(ctx, dr.FileRestoreRecord, died.ID, died); err != nil { // as a process leaves it that is killed
		t.Fatal(err)
	}
	if got := l.restores(t); !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	for range 2 { // and it is told once
		l.Reopen()
		got := l.restores(t)
		if len(got) != 3 || !slices.ContainsFunc(got, func(m string) bool {
			return strings.HasPrefix(m, "shop: bert put /srv of shop, as in "+id+", back onto shop below /nowhere: 0 restored") && strings.Contains(m, "2 failed")
		}) || !slices.ContainsFunc(got, func(m string) bool {
			return strings.HasPrefix(m, "shop: carl began to put /srv and 1 more of shop") && strings.Contains(m, "in the middle")
		}) {
			t.Errorf("%q", got)
		}
	}
	if err := l.Store.PutRecord(ctx, dr.FileRestoreRecord, died.ID, died); err != nil { // told, and killed before that was written down
		t.Fatal(err)
	}
	if l.Reopen(); len(l.restores(t)) != 3 {
		t.Errorf("told twice: %q", l.restores(t))
	}
}
