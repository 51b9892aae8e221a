package store

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
)

// secrets are what makes the blocks of two stores the same: how identifiers are made and under which key, and the key of
// the seals.
type secrets struct {
	algorithm  string
	hash, seal []byte
}

func (s *Store) secrets() secrets {
	fm := s.rep.FormatManager()
	return secrets{fm.GetHashFunction(), fm.GetHmacSecret(), fm.GetMasterKey()}
}

func alike(a, b *Store) bool {
	x, y := a.secrets(), b.secrets()
	return x.algorithm == y.algorithm && subtle.ConstantTimeCompare(x.hash, y.hash) == 1 && subtle.ConstantTimeCompare(x.seal, y.seal) == 1
}

// CreateLike makes a new, empty store with the secrets of another one, under a password of its own: a block has the same
// identifier in both and its sealed form is good in both, which is what Replicate needs. Whoever may open the one
// can read what was copied from the other.
func CreateLike(ctx context.Context, drv Driver, password string, like *Store) error {
	ctx, done := like.bind(ctx)
	defer done()
	if err := create(ctx, drv, password, like.secrets()); err != nil {
		return fmt.Errorf("create store in %s like %s: %w", drv, like, err)
	}
	return nil
}

// create makes a new store. Without secrets it gets its own.
func create(ctx context.Context, drv Driver, password string, of secrets) error {
	if password == "" {
		return errors.New("give a password")
	}
	place, err := drv.Create(ctx)
	if err != nil {
		return err
	}
	return errors.Join(initialize(ctx, place, password, of), place.Close(ctx))
}
