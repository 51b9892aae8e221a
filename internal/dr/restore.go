package dr

import (
	"fmt"
	"time"
)

// FileRestore is files of a snapshot that were put back on a server. It is kept in the store from before the first file is
// written until a master has written it down as an event.
type FileRestore struct {
	ID        string    `json:"id"`
	By        string    `json:"by,omitempty"` // who asked, as they say
	Began     time.Time `json:"began"`
	Ended     time.Time `json:"ended,omitzero"` // zero: the process ended in the middle of it
	Snapshot  string    `json:"snapshot"`
	Server    string    `json:"server"`    // whose files, by name
	ToServer  string    `json:"to_server"` // name
	ToID      string    `json:"to_id"`     // identifier of that
	Path      string    `json:"path"`      // the first, for people
	Paths     int       `json:"paths"`     // how many were named
	ToPath    string    `json:"to_path,omitempty"`
	Overwrite bool      `json:"overwrite,omitempty"`
	Restored  int64     `json:"restored"`
	Replaced  int64     `json:"replaced"`
	Beside    int64     `json:"beside"`
	Failed    int64     `json:"failed"`
	Bytes     int64     `json:"bytes"`           // of content
	Error     string    `json:"error,omitempty"` // why it broke off
}

// FileRestoreRecord is the kind under which a store keeps them, by their identifiers.
const FileRestoreRecord = "file-restore"

// FilesRestored is the kind of the event about one.
const FilesRestored = "files.restored"

// Event says what happened, for people.
func (r FileRestore) Event() Event {
	what, by, onto := r.Path, r.By, r.ToServer
	if r.Paths > 1 {
		what += fmt.Sprintf(" and %d more", r.Paths-1)
	}
	if by == "" {
		by = "somebody"
	}
	if r.ToPath != "" {
		onto += " below " + r.ToPath
	}
	e := Event{At: r.Ended, Kind: FilesRestored, Server: r.ToID, Subject: r.ID}
	e.Message = fmt.Sprintf("%s put %s of %s, as in %s, back onto %s: %d restored, %d replaced, %d beside what is there, %d failed; %d bytes",
		by, what, r.Server, r.Snapshot, onto, r.Restored, r.Replaced, r.Beside, r.Failed, r.Bytes)
	switch {
	case r.Ended.IsZero():
		e.At = r.Began
		e.Message = fmt.Sprintf("%s began to put %s of %s, as in %s, back onto %s, and the process ended in the middle: what is there is whole, how much it is was not written down",
			by, what, r.Server, r.Snapshot, onto)
	case r.Error != "":
		e.Message += "; it broke off: " + r.Error
	}
	return e
}
