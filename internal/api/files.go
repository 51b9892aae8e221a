package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/danielgtaylor/huma/v2"
)

// Files is what people ask of what is in snapshots. An appliance implements it, alone: no master is asked. Of a server that an appliance
// elsewhere captures a master asks that, whose store is near and has the newest; with Far it looks itself, into the far store: when the
// appliance is away, or has not what was kept long ago. Handler offers it as
// REST, and Client implements it again. A server is named by its name or its identifier; a snapshot by its identifier, "lkg", or
// "" for the newest that can hold the path. In paths of answers a backslash, a byte that is no UTF-8 and what cannot be
// printed are escapes, \\ and \xNN; in questions they may be.
type Files interface {
	ListFiles(ctx context.Context, q FilesQuery) (FileListing, error)
	// FindFiles looks through the history, newest first.
	FindFiles(ctx context.Context, q FindQuery) (FoundFiles, error)
	FileVersions(ctx context.Context, q VersionsQuery) (FileHistory, error)
	// GetFile writes a file's content, or a tar stream. After an error what was written is worth nothing.
	GetFile(ctx context.Context, q GetQuery, w io.Writer) error
	// RestoreFiles puts files back on a server, and says of each what became of it.
	RestoreFiles(ctx context.Context, r RestoreRequest) (Restored, error)
}

// FilesQuery asks for what is in a folder.
type FilesQuery struct {
	Server    string `path:"name" json:"server"`
	Snapshot  string `query:"snapshot" json:"snapshot"`
	Path      string `query:"path" json:"path"` // "" is the root
	Recursive bool   `query:"recursive" json:"recursive"`
	Limit     int    `query:"limit" json:"limit"` // names; 0: 1000
	Far       bool   `query:"far" json:"far"`
}

// FindQuery asks where a name is.
type FindQuery struct {
	Server  string `path:"name" json:"server"`
	Pattern string `query:"pattern" json:"pattern"`
	All     bool   `query:"all" json:"all"`     // also in images that have not been looked into: each is opened, which takes its time
	Limit   int    `query:"limit" json:"limit"` // 0: 1000
	Far     bool   `query:"far" json:"far"`
}

// VersionsQuery asks how a file differed over the history.
type VersionsQuery struct {
	Server string `path:"name" json:"server"`
	Path   string `query:"path" json:"path"`
	All    bool   `query:"all" json:"all"`
	Far    bool   `query:"far" json:"far"`
}

// GetQuery asks for a file's content.
type GetQuery struct {
	Server   string `path:"name" json:"server"`
	Snapshot string `query:"snapshot" json:"snapshot"`
	Path     string `query:"path" json:"path"`
	Tar      bool   `query:"tar" json:"tar"` // a file or folder with everything that Linux keeps of it
	Far      bool   `query:"far" json:"far"`
}

// FileInfo is one name in a snapshot.
type FileInfo struct {
	Path     string    `json:"path"`
	Kind     string    `json:"kind"` // file, folder, symlink, link (another name of a file), char-device, block-device, pipe
	Mode     string    `json:"mode"` // octal
	UID      uint32    `json:"uid"`
	GID      uint32    `json:"gid"`
	Size     int64     `json:"size"` // bytes of a file
	Modified time.Time `json:"modified,omitzero"`
	Target   string    `json:"target,omitempty"`  // of links
	Content  string    `json:"content,omitempty"` // the same for the same content, where it is known
}

// FileListing is what is in a folder of a snapshot.
type FileListing struct {
	Snapshot string     `json:"snapshot"`
	Taken    time.Time  `json:"taken"`
	Data     bool       `json:"data,omitempty"` // the snapshot is of data
	Path     string     `json:"path"`
	Files    []FileInfo `json:"files"`
	More     bool       `json:"more,omitempty"`  // the limit was reached
	Notes    []string   `json:"notes,omitempty"` // what of the snapshot cannot be seen
}

// FoundFile is a name in one snapshot.
type FoundFile struct {
	Snapshot string    `json:"snapshot"`
	Taken    time.Time `json:"taken"`
	FileInfo
}

// FoundFiles is what was found.
type FoundFiles struct {
	Found  []FoundFile `json:"found"`
	More   bool        `json:"more,omitempty"`
	Unseen []string    `json:"unseen"` // snapshots that have not been looked into
}

// FileVersion is a file as it was in one snapshot or in several that follow one another.
type FileVersion struct {
	Snapshot   string    `json:"snapshot"` // the newest of them
	Taken      time.Time `json:"taken"`
	First      string    `json:"first"` // the oldest
	FirstTaken time.Time `json:"first_taken"`
	Snapshots  int       `json:"snapshots"`
	File       *FileInfo `json:"file,omitempty"`
	Gone       bool      `json:"gone,omitempty"` // it was not there
}

// FileHistory is every version of a file, newest first.
type FileHistory struct {
	Path     string        `json:"path"`
	Versions []FileVersion `json:"versions"`
	Unseen   []string      `json:"unseen"`
}

// RestoreRequest says what to put back where.
type RestoreRequest struct {
	Server    string   `json:"server"`
	Snapshot  string   `json:"snapshot,omitempty"`
	Paths     []string `json:"paths"`
	ToServer  string   `json:"to_server,omitempty"` // "": where they are from
	ToPath    string   `json:"to_path,omitempty"`   // folder that is there; "": their own places
	Overwrite bool     `json:"overwrite,omitempty"` // also what is newer
	By        string   `json:"by,omitempty"`        // who asks, as they say
	Far       bool     `json:"far,omitempty"`       // then ToServer is one that the master itself reaches
}

// RestoredFile says what became of one name.
type RestoredFile struct {
	Path string `json:"path"` // on the server
	As   string `json:"as"`   // where it lies
	What string `json:"what"` // restored, replaced, beside (what is there stays), there (a folder), failed
	Note string `json:"note,omitempty"`
}

// Restored says what became of everything.
type Restored struct {
	Snapshot string         `json:"snapshot"`
	Taken    time.Time      `json:"taken"`
	ToServer string         `json:"to_server"`
	Files    []RestoredFile `json:"files"` // the first 100,000
	Restored int64          `json:"restored"`
	Replaced int64          `json:"replaced"`
	Beside   int64          `json:"beside"`
	Failed   int64          `json:"failed"`
	Bytes    int64          `json:"bytes"`           // of content
	Error    string         `json:"error,omitempty"` // why it broke off: what is not named above was not put back
}

func registerFiles(a huma.API, f Files) {
	huma.Get(a, "/v1/servers/{name}/files", func(ctx context.Context, in *FilesQuery) (*body[FileListing], error) {
		return answer(f.ListFiles(ctx, *in))
	})
	huma.Get(a, "/v1/servers/{name}/files/find", func(ctx context.Context, in *FindQuery) (*body[FoundFiles], error) {
		return answer(f.FindFiles(ctx, *in))
	})
	huma.Get(a, "/v1/servers/{name}/files/versions", func(ctx context.Context, in *VersionsQuery) (*body[FileHistory], error) {
		return answer(f.FileVersions(ctx, *in))
	})
	huma.Get(a, "/v1/servers/{name}/files/content", func(ctx context.Context, in *GetQuery) (*huma.StreamResponse, error) {
		return stream(func(w io.Writer) error { return f.GetFile(ctx, *in, w) })
	})
	huma.Post(a, "/v1/files/restore", func(ctx context.Context, in *body[RestoreRequest]) (*body[Restored], error) {
		return answer(f.RestoreFiles(ctx, in.Body))
	})
}

// streamPiece is how much is read before an answer begins.
const streamPiece = 64 << 10

// stream answers with what is written. What goes wrong before the first byte is an error like any other; after it the connection
// is cut, so that nobody takes a part for the whole.
func stream(write func(io.Writer) error) (*huma.StreamResponse, error) {
	r, w := io.Pipe()
	go func() { w.CloseWithError(write(w)) }()
	first := make([]byte, streamPiece)
	n, err := r.Read(first)
	if err != nil && !errors.Is(err, io.EOF) {
		_, err = answer(struct{}{}, err)
		return nil, err
	}
	return &huma.StreamResponse{Body: func(c huma.Context) {
		defer r.Close()
		c.SetHeader("Content-Type", "application/octet-stream")
		_, err := c.BodyWriter().Write(first[:n])
		if err == nil {
			_, err = io.Copy(c.BodyWriter(), r)
		}
		if err != nil {
			panic(http.ErrAbortHandler)
		}
	}}, nil
}

// ListFiles implements Files.
func (c *Client) ListFiles(ctx context.Context, q FilesQuery) (FileListing, error) {
	return call[FileListing](ctx, c, "GET", "/v1/servers/"+seg(q.Server)+"/files", url.Values{"snapshot": {q.Snapshot}, "path": {q.Path},
		"recursive": {strconv.FormatBool(q.Recursive)}, "limit": {strconv.Itoa(q.Limit)}, "far": {strconv.FormatBool(q.Far)}}, nil)
}

// FindFiles implements Files.
func (c *Client) FindFiles(ctx context.Context, q FindQuery) (FoundFiles, error) {
	return call[FoundFiles](ctx, c, "GET", "/v1/servers/"+seg(q.Server)+"/files/find", url.Values{"pattern": {q.Pattern},
		"all": {strconv.FormatBool(q.All)}, "limit": {strconv.Itoa(q.Limit)}, "far": {strconv.FormatBool(q.Far)}}, nil)
}

// FileVersions implements Files.
func (c *Client) FileVersions(ctx context.Context, q VersionsQuery) (FileHistory, error) {
	return call[FileHistory](ctx, c, "GET", "/v1/servers/"+seg(q.Server)+"/files/versions", url.Values{"path": {q.Path}, "all": {strconv.FormatBool(q.All)},
		"far": {strconv.FormatBool(q.Far)}}, nil)
}

// RestoreFiles implements Files.
func (c *Client) RestoreFiles(ctx context.Context, r RestoreRequest) (Restored, error) {
	return call[Restored](ctx, c, "POST", "/v1/files/restore", nil, r)
}

// GetFile implements Files.
func (c *Client) GetFile(ctx context.Context, q GetQuery, w io.Writer) error {
	resp, err := c.send(ctx, "GET", "/v1/servers/"+seg(q.Server)+"/files/content", url.Values{"snapshot": {q.Snapshot}, "path": {q.Path},
		"tar": {strconv.FormatBool(q.Tar)}, "far": {strconv.FormatBool(q.Far)}}, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(w, resp.Body); err != nil {
		return fmt.Errorf("get %s: it broke off; what has arrived is not the whole: %w", q.Path, err)
	}
	return nil
}
