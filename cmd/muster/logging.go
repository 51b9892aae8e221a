package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/engine"
)

// logFlags say how a long-running command logs.
type logFlags struct {
	format, level string
}

func (f *logFlags) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.format, "log-format", "text", "form of the log on standard error: text or json")
	cmd.Flags().StringVar(&f.level, "log-level", "info", "least of what is logged: debug, info, warn or error; SIGUSR1 turns debug on and off")
	_ = cmd.RegisterFlagCompletionFunc("log-format", cobra.FixedCompletions([]string{"text", "json"}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("log-level", cobra.FixedCompletions([]string{"debug", "info", "warn", "error"}, cobra.ShellCompDirectiveNoFileComp))
}

// open makes the log, and makes it that of every part that has none of its own. It ends listening to SIGUSR1 with ctx.
func (f *logFlags) open(ctx context.Context, out io.Writer) (*slog.Logger, error) {
	var wanted slog.Level
	if err := wanted.UnmarshalText([]byte(f.level)); err != nil {
		return nil, withCode(exitUsage, fmt.Errorf("log level %q: use debug, info, warn or error", f.level))
	}
	level := &slog.LevelVar{}
	level.Set(wanted)
	options := &slog.HandlerOptions{Level: level}
	if isJournal(out) {
		options.ReplaceAttr = withoutTime // the journal has its own
	}
	var handler slog.Handler
	switch f.format {
	case "text":
		handler = slog.NewTextHandler(out, options)
	case "json":
		handler = slog.NewJSONHandler(out, options)
	default:
		return nil, withCode(exitUsage, fmt.Errorf("log format %q: use text or json", f.format))
	}
	log := slog.New(ofOperation{handler})
	slog.SetDefault(log)
	toggle := make(chan os.Signal, 1)
	signal.Notify(toggle, syscall.SIGUSR1)
	go func() {
		defer signal.Stop(toggle)
		for {
			select {
			case <-ctx.Done():
				return
			case <-toggle:
				to := slog.LevelDebug
				if level.Level() == slog.LevelDebug {
					to = max(wanted, slog.LevelInfo)
				}
				level.Set(to)
				log.WarnContext(ctx, "log level changed", "level", to.String())
			}
		}
	}()
	return log, nil
}

// withoutTime leaves out when a line was written.
func withoutTime(groups []string, a slog.Attr) slog.Attr {
	if len(groups) == 0 && a.Key == slog.TimeKey {
		return slog.Attr{}
	}
	return a
}

// isJournal says whether what is written goes to systemd's journal, which names the file it gave in JOURNAL_STREAM.
func isJournal(out io.Writer) bool {
	f, ok := out.(*os.File)
	var st syscall.Stat_t
	if !ok || os.Getenv("JOURNAL_STREAM") == "" || syscall.Fstat(int(f.Fd()), &st) != nil {
		return false
	}
	return os.Getenv("JOURNAL_STREAM") == fmt.Sprintf("%d:%d", st.Dev, st.Ino)
}

// ofOperation adds to every line that is written for an operation which one it is, so that one night's story can be found.
type ofOperation struct{ slog.Handler }

// Handle implements slog.Handler.
func (h ofOperation) Handle(ctx context.Context, r slog.Record) error {
	if id := engine.RunOf(ctx); id != "" {
		r.AddAttrs(slog.String("operation", id))
	}
	return h.Handler.Handle(ctx, r)
}

// WithAttrs implements slog.Handler.
func (h ofOperation) WithAttrs(attrs []slog.Attr) slog.Handler {
	return ofOperation{h.Handler.WithAttrs(attrs)}
}

// WithGroup implements slog.Handler.
func (h ofOperation) WithGroup(name string) slog.Handler {
	return ofOperation{h.Handler.WithGroup(name)}
}

// tell writes events of the catalog into the log.
func tell(log *slog.Logger) func(context.Context, dr.Event) {
	return func(ctx context.Context, e dr.Event) {
		attrs := []slog.Attr{slog.String("kind", e.Kind), slog.Int64("seq", e.Seq)}
		if e.Server != "" {
			attrs = append(attrs, slog.String("server", e.Server))
		}
		if e.Subject != "" {
			attrs = append(attrs, slog.String("subject", e.Subject))
		}
		log.LogAttrs(ctx, slog.LevelInfo, "event", append(attrs, slog.String("message", e.Message))...)
	}
}
