package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

// manPages writes a page for each command, dated with the release rather than the day.
func manPages(t *testing.T, dir string, released time.Time) {
	t.Helper()
	root := rootCommand()
	root.DisableAutoGenTag = true
	root.InitDefaultCompletionCmd()
	if err := doc.GenManTree(root, &doc.GenManHeader{Section: "1", Source: "Muster", Manual: "Muster", Date: &released}, dir); err != nil {
		t.Fatal(err)
	}
}

// TestEveryCommandHasAManPage writes them where MUSTER_MAN says, for packages.
func TestEveryCommandHasAManPage(t *testing.T) {
	dir, released := os.Getenv("MUSTER_MAN"), time.Unix(0, 0).UTC()
	if dir == "" {
		dir = t.TempDir()
	} else if at, err := time.Parse(time.DateOnly, os.Getenv("MUSTER_RELEASED")); err == nil {
		released = at
	}
	manPages(t, dir, released)
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		if c.Hidden || !c.IsAvailableCommand() && c.HasParent() || c.Name() == "help" {
			return
		}
		page, err := os.ReadFile(filepath.Join(dir, strings.ReplaceAll(c.CommandPath(), " ", "-")+".1"))
		if err != nil || !strings.Contains(string(page), ".SH SYNOPSIS") {
			t.Errorf("%s: %v", c.CommandPath(), err)
		}
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk(rootCommand())
}
