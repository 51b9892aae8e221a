package api

import (
	"errors"
	"fmt"
	"net/http"
)

// Kind says what an error means to the one who asked.
type Kind string

// The kinds of error, each an HTTP status.
const (
	NotFound    Kind = "not-found"   // 404
	Conflict    Kind = "conflict"    // 409: it exists, is busy, or its state forbids it
	Invalid     Kind = "invalid"     // 422
	Refused     Kind = "refused"     // 403: it would break a promise
	Unavailable Kind = "unavailable" // 503: try again, or start what is missing
	Internal    Kind = "internal"    // 500
)

var statusOf = map[Kind]int{NotFound: http.StatusNotFound, Conflict: http.StatusConflict, Invalid: http.StatusUnprocessableEntity,
	Refused: http.StatusForbidden, Unavailable: http.StatusServiceUnavailable, Internal: http.StatusInternalServerError}

func kindOf(status int) Kind {
	for kind, s := range statusOf {
		if s == status {
			return kind
		}
	}
	if status == http.StatusBadRequest {
		return Invalid
	}
	return Internal
}

// Error is an error with a kind that survives the wire. It serves as huma's error form as well.
type Error struct {
	Kind    Kind   `json:"kind"`
	Message string `json:"message"`
	cause   error
}

// Errorf makes an *Error; %w keeps the cause for errors.Is on this side of the wire.
func Errorf(kind Kind, format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	return &Error{Kind: kind, Message: err.Error(), cause: errors.Unwrap(err)}
}

func (e *Error) Error() string { return e.Message }

// Unwrap gives the cause, on the side where the error was made.
func (e *Error) Unwrap() error { return e.cause }

// GetStatus is the HTTP status of the error.
func (e *Error) GetStatus() int {
	if s, ok := statusOf[e.Kind]; ok {
		return s
	}
	return http.StatusInternalServerError
}

// KindOf gives the kind of an error: Internal for one that is no *Error.
func KindOf(err error) Kind {
	var e *Error
	if errors.As(err, &e) {
		return e.Kind
	}
	return Internal
}
