package main

import (
	"context"
	"errors"

	"github.com/musterdr/muster/internal/capture/windows"
)

// own are the commands that only Linux needs.
func own([]string) error { return errors.New(usage) }

func forget(context.Context) error { return windows.RemoveShadows() }

func prepare() {}
