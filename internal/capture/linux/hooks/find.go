package hooks

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// product is a kind of database server.
type product string

const (
	postgresql product = "PostgreSQL"
	mysqlish   product = "MySQL or MariaDB"
)

// products are the names of servers' programs.
var products = map[string]product{
	"postgres": postgresql, "postmaster": postgresql, "edb-postgres": postgresql,
	"mysqld": mysqlish, "mariadbd": mysqlish,
}

// server is a database server that runs.
type server struct {
	product   product
	pid       int
	uid, gid  uint32
	groups    []uint32
	program   string // its executable
	socket    string
	uncovered string // why nothing can be done about it, and what may be
}

func (s server) String() string {
	if s.socket == "" {
		return fmt.Sprintf("%s, process %d", s.product, s.pid)
	}
	return fmt.Sprintf("%s at %s", s.product, s.socket)
}

// find lists the database servers that run below a root, "/" or a fixture tree, in the order of their process numbers. A
// process that ends meanwhile is left out.
func find(root string) []server {
	programs := map[int]string{}
	for _, name := range list(filepath.Join(root, "proc"), maxProcesses) {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		exe, err := os.Readlink(filepath.Join(root, "proc", name, "exe"))
		exe = strings.TrimSuffix(exe, " (deleted)") // its package was upgraded under it
		if _, ok := products[filepath.Base(exe)]; err == nil && ok {
			programs[pid] = exe
		}
	}
	var out []server
	for pid, exe := range programs {
		s := server{product: products[filepath.Base(exe)], pid: pid, program: exe}
		parent, ok := s.identity(root)
		if _, child := programs[parent]; !ok || child && products[filepath.Base(programs[parent])] == s.product {
			continue // gone, or one of the processes of a server
		}
		s.look(root)
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b server) int { return a.pid - b.pid })
	return out
}

// identity reads as whom the server runs, and its parent.
func (s *server) identity(root string) (parent int, ok bool) {
	status, err := read(filepath.Join(root, "proc", strconv.Itoa(s.pid), "status"), maxLine)
	if err != nil {
		return 0, false
	}
	for line := range strings.Lines(status) {
		key, rest, _ := strings.Cut(line, ":")
		var numbers []uint32
		for _, f := range strings.Fields(rest) {
			n, err := strconv.ParseUint(f, 10, 32)
			if err != nil {
				break
			}
			numbers = append(numbers, uint32(n))
		}
		switch {
		case key == "PPid" && len(numbers) == 1:
			parent = int(numbers[0])
		case key == "Uid" && len(numbers) == 4:
			s.uid, ok = numbers[1], true
		case key == "Gid" && len(numbers) == 4:
			s.gid = numbers[1]
		case key == "Groups":
			s.groups = numbers
		}
	}
	return parent, ok
}

// look finds the server's socket, or why it cannot be reached.
func (s *server) look(root string) {
	dir := filepath.Join(root, "proc", strconv.Itoa(s.pid))
	if inside(root, dir) {
		s.uncovered = "it runs in a container or a changed root, where this release reaches no database: its files were frozen like all others, and it recovers from them as after a power cut; a hook of the server's own can bring it to rest"
		return
	}
	for _, path := range listening(dir) {
		base := filepath.Base(path)
		if s.product == postgresql && !strings.HasPrefix(base, ".s.PGSQL.") || s.product == mysqlish && strings.Contains(base, "mysqlx") {
			continue
		}
		if !filepath.IsAbs(path) {
			cwd, err := os.Readlink(filepath.Join(dir, "cwd"))
			if err != nil {
				continue
			}
			path = filepath.Join(cwd, path)
		}
		s.socket = path
		break
	}
	if s.socket == "" {
		s.uncovered = "it listens on no unix socket, over which it would be spoken to: give it one (PostgreSQL: unix_socket_directories; MySQL, MariaDB: socket)"
		return
	}
	ours, err := os.Stat(filepath.Join(root, s.socket))
	theirs, terr := os.Stat(filepath.Join(dir, "root", s.socket))
	if err != nil || terr != nil || !os.SameFile(ours, theirs) {
		s.uncovered = fmt.Sprintf("its socket %s is in a folder that only the server itself sees (PrivateTmp of its systemd unit?): put it below /run", s.socket)
	}
}

// inside says whether a process lives in another process namespace or has another root than we. A mount namespace of its
// own says nothing: systemd gives one to many a service.
func inside(root, dir string) bool {
	theirs, err := os.Readlink(filepath.Join(dir, "ns/pid"))
	ours, oerr := os.Readlink(filepath.Join(root, "proc/self/ns/pid"))
	if err != nil || oerr != nil || theirs != ours {
		return true
	}
	a, err := os.Stat(filepath.Join(dir, "root"))
	b, oerr := os.Stat(root)
	return err != nil || oerr != nil || !os.SameFile(a, b)
}

// listening lists the unix sockets that a process waits on, in order.
func listening(dir string) []string {
	held := map[string]bool{}
	for _, fd := range list(filepath.Join(dir, "fd"), maxFiles) {
		target, err := os.Readlink(filepath.Join(dir, "fd", fd))
		if inode, ok := strings.CutPrefix(target, "socket:["); err == nil && ok {
			held[strings.TrimSuffix(inode, "]")] = true
		}
	}
	table, err := read(filepath.Join(dir, "net/unix"), maxTable)
	if err != nil {
		return nil
	}
	const accepts = 0x10000 // __SO_ACCEPTCON
	var out []string
	for line := range strings.Lines(table) {
		// Num RefCount Protocol Flags Type St Inode Path, the last as it is, with white space in it
		f := strings.Fields(line)
		if len(f) < 8 || !held[f[6]] {
			continue
		}
		flags, err := strconv.ParseUint(f[3], 16, 64)
		_, path, found := strings.Cut(line, " "+f[6]+" ")
		path = strings.TrimSuffix(path, "\n")
		if err != nil || flags&accepts == 0 || !found || strings.HasPrefix(path, "@") || len(path) > syscall.PathMax {
			continue
		}
		out = append(out, path)
	}
	slices.Sort(out)
	return out
}

// list gives the names in a folder, in no order; none if it cannot be read.
func list(dir string, most int) []string {
	f, err := os.Open(dir)
	if err != nil {
		return nil
	}
	defer f.Close()
	out, _ := f.Readdirnames(most)
	return out
}

// read reads a file of the kernel's up to a limit.
func read(path string, most int64) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, most))
	return string(b), err
}
