package api

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"

	"github.com/musterdr/muster/internal/dr"
)

// MaxWait bounds how long one request may wait for an operation to go further.
const MaxWait = 30 * time.Second

// MaxEvents bounds one page of events.
const MaxEvents = 1000

// MaxServers bounds one page of servers.
const MaxServers = 500

// maxBody bounds a request's body in bytes.
const maxBody = 4 << 20

// Handler offers an Operator and Files as REST under /v1, with its OpenAPI description at /openapi.json.
func Handler(op Operator, files Files, version string) http.Handler {
	mux := http.NewServeMux()
	a := humago.New(mux, restConfig(version))
	registerServers(a, op)
	registerWork(a, op)
	registerSilos(a, op)
	registerRecord(a, op)
	registerFiles(a, files)
	return http.MaxBytesHandler(mux, maxBody)
}

// newError gives huma's own complaints (a body that does not parse) the form of ours.
func newError(status int, message string, errs ...error) huma.StatusError {
	for _, err := range errs {
		var e *Error
		if errors.As(err, &e) {
			return Errorf(e.Kind, "%w", err)
		}
		message += ": " + err.Error()
	}
	return &Error{Kind: kindOf(status), Message: message}
}

type body[T any] struct {
	Body T
}

// Named is the part of a request that names what it is about. It is exported because huma fills in only exported fields,
// embedded ones included.
type Named struct {
	Name string `path:"name" maxLength:"100" doc:"server's name or identifier"`
}

type snapshotBody struct {
	Snapshot string `json:"snapshot,omitempty" doc:"snapshot's identifier; empty means the newest"`
}

// answer turns an operator's answer into huma's form. An error that is no *Error is a fault of ours: it is logged in
// full and told in full too, because the one who reads it is the operator of this installation.
func answer[T any](v T, err error) (*body[T], error) {
	if err == nil {
		return &body[T]{Body: v}, nil
	}
	var e *Error
	if errors.As(err, &e) {
		return nil, Errorf(e.Kind, "%w", err) // with what was said around it
	}
	if !errors.Is(err, context.Canceled) {
		slog.Error("answer request", "error", err)
	}
	return nil, &Error{Kind: Internal, Message: err.Error()}
}

// list answers null never: an empty list is [].
func list[T any](v []T, err error) (*body[[]T], error) {
	if v == nil {
		v = []T{}
	}
	return answer(v, err)
}

type nothing struct{}

func registerServers(a huma.API, op Operator) {
	huma.Get(a, "/v1/version", func(ctx context.Context, _ *nothing) (*body[Version], error) { return answer(op.Version(ctx)) })
	huma.Post(a, "/v1/contact", func(ctx context.Context, in *struct {
		Appliance string `query:"appliance" maxLength:"63"`
		Body      dr.Source
	}) (*body[Contact], error) {
		return answer(op.Contact(ctx, in.Appliance, in.Body))
	})
	huma.Get(a, "/v1/servers", func(ctx context.Context, in *struct {
		After string `query:"after" maxLength:"100" doc:"the last name of the page before; none: the first page"`
		Limit int    `query:"limit" minimum:"0" maximum:"500" doc:"how many a page has at most; 0: 500. Fewer are the last page"`
	}) (*body[[]ServerStatus], error) {
		return list(op.Servers(ctx, in.After, in.Limit))
	})
	huma.Post(a, "/v1/servers", func(ctx context.Context, in *body[dr.Server]) (*body[dr.Server], error) {
		return answer(op.AddServer(ctx, in.Body))
	})
	huma.Get(a, "/v1/servers/{name}", func(ctx context.Context, in *Named) (*body[ServerStatus], error) {
		return answer(op.Server(ctx, in.Name))
	})
	huma.Patch(a, "/v1/servers/{name}", func(ctx context.Context, in *struct {
		Named
		Body ServerChange
	}) (*body[dr.Server], error) {
		return answer(op.UpdateServer(ctx, in.Name, in.Body))
	})
	huma.Delete(a, "/v1/servers/{name}", func(ctx context.Context, in *Named) (*nothing, error) {
		_, err := answer(nothing{}, op.RemoveServer(ctx, in.Name))
		return nil, err
	})
	huma.Get(a, "/v1/servers/{name}/snapshots", func(ctx context.Context, in *Named) (*body[[]dr.Record], error) {
		return list(op.Snapshots(ctx, in.Name))
	})
	huma.Get(a, "/v1/servers/{name}/promotions", func(ctx context.Context, in *Named) (*body[[]dr.Promotion], error) {
		return list(op.Promotions(ctx, in.Name))
	})
	huma.Get(a, "/v1/snapshots/{name}", func(ctx context.Context, in *Named) (*body[dr.Record], error) {
		return answer(op.Record(ctx, in.Name))
	})
}

func registerWork(a huma.API, op Operator) {
	type start struct {
		Named
		Body snapshotBody
	}
	huma.Post(a, "/v1/servers/{name}/snapshot", func(ctx context.Context, in *Named) (*body[Operation], error) {
		return answer(op.Snapshot(ctx, in.Name))
	})
	huma.Post(a, "/v1/servers/{name}/snapshot-data", func(ctx context.Context, in *Named) (*body[Operation], error) {
		return answer(op.SnapshotData(ctx, in.Name))
	})
	huma.Post(a, "/v1/servers/{name}/prerecover", func(ctx context.Context, in *start) (*body[Operation], error) {
		return answer(op.PreRecover(ctx, in.Name, in.Body.Snapshot))
	})
	huma.Post(a, "/v1/servers/{name}/test", func(ctx context.Context, in *start) (*body[Operation], error) {
		return answer(op.Test(ctx, in.Name, in.Body.Snapshot))
	})
	huma.Post(a, "/v1/snapshots/{name}/rule", func(ctx context.Context, in *struct {
		Named
		Body RuleRequest
	}) (*body[Operation], error) {
		return answer(op.Rule(ctx, in.Name, in.Body))
	})
	huma.Get(a, "/v1/operations", func(ctx context.Context, _ *nothing) (*body[[]Operation], error) { return list(op.Operations(ctx)) })
	huma.Get(a, "/v1/operations/{name}", func(ctx context.Context, in *struct {
		Named
		Seen int64 `query:"seen" doc:"answer when the operation has changed since"`
		Wait int   `query:"wait" minimum:"0" maximum:"30000" doc:"milliseconds to wait for that at most"`
	}) (*body[Operation], error) {
		return answer(op.Operation(ctx, in.Name, in.Seen, time.Duration(in.Wait)*time.Millisecond))
	})
	huma.Post(a, "/v1/servers/{name}/replicate", func(ctx context.Context, in *start) (*body[Operation], error) {
		return answer(op.Replicate(ctx, in.Name, in.Body.Snapshot))
	})
	huma.Get(a, "/v1/appliances", func(ctx context.Context, _ *nothing) (*body[[]ApplianceStatus], error) {
		return list(op.Appliances(ctx))
	})
	huma.Post(a, "/v1/operations/{name}/cancel", func(ctx context.Context, in *Named) (*nothing, error) {
		_, err := answer(nothing{}, op.CancelOperation(ctx, in.Name))
		return nil, err
	})
	huma.Post(a, "/v1/invocations", func(ctx context.Context, in *body[InvokeRequest]) (*body[Operation], error) {
		return answer(op.Invoke(ctx, in.Body))
	})
	huma.Get(a, "/v1/invocations", func(ctx context.Context, in *struct {
		All bool `query:"all"`
	}) (*body[[]dr.Invocation], error) {
		return list(op.Invocations(ctx, in.All))
	})
	huma.Get(a, "/v1/invocations/{name}", func(ctx context.Context, in *Named) (*body[dr.Invocation], error) {
		return answer(op.Invocation(ctx, in.Name))
	})
	huma.Post(a, "/v1/invocations/{name}/end", func(ctx context.Context, in *struct {
		Named
		Body struct {
			Keep bool `json:"keep" doc:"keep what the machine wrote"`
		}
	}) (*body[Operation], error) {
		return answer(op.EndInvocation(ctx, in.Name, in.Body.Keep))
	})
	huma.Post(a, "/v1/invocations/{name}/move", func(ctx context.Context, in *struct {
		Named
		Body MoveRequest
	}) (*body[Operation], error) {
		return answer(op.MoveInvocation(ctx, in.Name, in.Body))
	})
	huma.Post(a, "/v1/invocations/{name}/abandon", func(ctx context.Context, in *struct {
		Named
		Body AbandonRequest
	}) (*body[dr.Invocation], error) {
		return answer(op.AbandonInvocation(ctx, in.Name, in.Body))
	})
	huma.Get(a, "/v1/store", func(ctx context.Context, _ *nothing) (*body[[]StoreUsage], error) { return list(op.StoreUsage(ctx)) })
	huma.Get(a, "/v1/meter/{month}", func(ctx context.Context, in *struct {
		Month    string `path:"month" maxLength:"7"`
		Customer string `query:"customer" maxLength:"63"`
	}) (*body[[]dr.Metered], error) {
		return list(op.Meter(ctx, in.Month, in.Customer))
	})
	huma.Post(a, "/v1/store/verify", func(ctx context.Context, in *body[snapshotBody]) (*body[Operation], error) {
		return answer(op.VerifyStore(ctx, in.Body.Snapshot))
	})
	huma.Post(a, "/v1/store/collect", func(ctx context.Context, in *body[struct {
		Alone bool `json:"alone"`
	}]) (*body[Operation], error) {
		return answer(op.CollectStore(ctx, in.Body.Alone))
	})
	huma.Post(a, "/v1/store/adopt", func(ctx context.Context, _ *nothing) (*body[Operation], error) { return answer(op.AdoptStore(ctx)) })
}

func registerSilos(a huma.API, op Operator) {
	huma.Get(a, "/v1/silos", func(ctx context.Context, _ *nothing) (*body[[]SiloStatus], error) { return list(op.ListSilos(ctx)) })
	huma.Get(a, "/v1/silos/{name}", func(ctx context.Context, in *Named) (*body[SiloStatus], error) {
		return answer(op.ShowSilo(ctx, in.Name))
	})
	huma.Post(a, "/v1/silos/{name}/drain", func(ctx context.Context, in *struct {
		Named
		Body DrainRequest
	}) (*body[SiloStatus], error) {
		return answer(op.DrainSilo(ctx, in.Name, in.Body))
	})
	huma.Delete(a, "/v1/silos/{name}", func(ctx context.Context, in *Named) (*nothing, error) {
		_, err := answer(nothing{}, op.RemoveSilo(ctx, in.Name))
		return nil, err
	})
}

func registerRecord(a huma.API, op Operator) {
	huma.Get(a, "/v1/tickets", func(ctx context.Context, in *struct {
		All bool `query:"all"`
	}) (*body[[]dr.Ticket], error) {
		return list(op.Tickets(ctx, in.All))
	})
	huma.Post(a, "/v1/tickets/{name}/close", func(ctx context.Context, in *struct {
		Named
		Body struct {
			Reason string `json:"reason" minLength:"1" maxLength:"1000"`
		}
	}) (*nothing, error) {
		_, err := answer(nothing{}, op.CloseTicket(ctx, in.Name, in.Body.Reason))
		return nil, err
	})
	huma.Get(a, "/v1/events", func(ctx context.Context, in *struct {
		After  int64  `query:"after"`
		Limit  int    `query:"limit" minimum:"0" maximum:"1000"`
		Server string `query:"server" maxLength:"100"`
	}) (*body[[]dr.Event], error) {
		return list(op.Events(ctx, in.After, in.Limit, in.Server))
	})
	huma.Get(a, "/v1/doctor", func(ctx context.Context, _ *nothing) (*body[[]Finding], error) { return list(op.Doctor(ctx)) })
}

// Once: huma has one such function for all handlers of a process.
func init() { huma.NewError = newError }

func restConfig(version string) huma.Config {
	config := huma.DefaultConfig("Muster", version)
	config.DocsPath = "" // huma's own page loads scripts from elsewhere
	config.SchemasPath = ""
	config.CreateHooks = nil // no $schema field in answers
	return config
}
