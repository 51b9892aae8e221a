package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/musterdr/muster/internal/catalog"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/s3"
	"github.com/musterdr/muster/internal/trust"
)

func masterCustomerCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "customer", Short: "Look after customers: add, list, move, remove", Args: cobra.NoArgs,
		Long: `A customer has appliances, a far store into which they send, and a key of its own that opens that store and no other. A running
'muster serve' learns of a new customer by itself.`,
		Example: "  muster master customer add acme\n  muster master enrol --customer acme --appliance office"}
	cmd.AddCommand(customerAddCommand(), customerListCommand(), customerMoveCommand(), customerRemoveCommand())
	return cmd
}

// customersDesk is where an installation's customers are looked after.
type customersDesk struct {
	install   install
	set       settings
	authority *trust.Authority
	book      *store.Customers
}

// atDesk does something with the customers of an installation, beside a 'muster serve' that may be running.
func atDesk(cmd *cobra.Command, passphraseFile string, do func(d customersDesk) error) error {
	i := installation(cmd)
	authority, err := i.openAuthority(cmd, passphraseFile)
	if err != nil {
		return err
	}
	st, set, err := i.openStore(cmd)
	if err != nil {
		return err
	}
	defer st.Close(context.Background())
	book, err := i.openBook(cmd.Context(), st, set, authority)
	if err != nil {
		return err
	}
	err = do(customersDesk{i, set, authority, book})
	switch {
	case errors.Is(err, store.ErrUnknownCustomer):
		err = withCode(exitNotFound, err)
	case errors.Is(err, store.ErrCustomerExists):
		err = withCode(exitRefused, err)
	}
	return errors.Join(err, book.Close())
}

func customerAddCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "add NAME", Short: "Add a customer, with a far store and a key of its own", Args: cobra.ExactArgs(1),
		Long: `Add a customer: make its key, sealed in the authority, and its far store. The store is put beside the installation's own unless --store names
another place.

With --key-file a far store that is there already becomes the customer's: after a master was lost, with the key that each of the customer's
appliances has. 'muster store adopt' then finds what it holds.

With --awaited the far store is made by the customer's first appliance, when it connects. That is for an appliance which has a near store from a master that is lost:
what it holds can be sent only into a far store with the same secrets.`,
		Example: `  muster master customer add acme
  muster master customer add acme --store /mnt/raid/acme
  muster master customer add acme --store 's3://acme/muster?endpoint=https://s3.example.org'`}
	place := cmd.Flags().String("store", "", "folder of the far store, or s3://BUCKET/PREFIX?endpoint=https://HOST (default: beside the installation's own)")
	keyFile := cmd.Flags().String("key-file", "", "key of a far store that is there already")
	awaited := cmd.Flags().Bool("awaited", false, "make no far store: the customer's first appliance makes it, like the near store that it may have already")
	cmd.MarkFlagsMutuallyExclusive("awaited", "key-file")
	passphraseFile := cmd.Flags().String("passphrase-file", "", "file with the master's passphrase, if it has one (default: ask)")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := dr.ValidateLabel("customer", args[0]); err != nil {
			return withCode(exitUsage, err)
		}
		return atDesk(cmd, *passphraseFile, func(d customersDesk) error {
			c := store.Customer{Name: args[0], Created: time.Now().UTC(), Awaited: *awaited}
			var err error
			if c.Place, err = d.set.farPlace(c.Name, *place); err != nil {
				return err
			}
			if *keyFile != "" {
				if err := d.giveKey(c.Name, *keyFile); err != nil {
					return err
				}
			}
			if err := d.book.Add(cmd.Context(), c); err != nil {
				return err
			}
			if wantJSON(cmd) {
				return printJSON(cmd, c)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "Added %s, far store in %s.\nNext: 'muster master enrol --customer %s --appliance NAME'. Its key is in the authority: back that up with 'muster master backup'.\n", c.Name, c.Place, c.Name)
			return nil
		})
	}
	return cmd
}

// giveKey makes a key that somebody kept that of a customer.
func (d customersDesk) giveKey(customer, file string) error {
	raw, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("read key: %w", err)
	}
	return d.authority.GiveCustomerKey(customer, strings.TrimSpace(string(raw)))
}

// farPlace makes where a customer's far store is to be complete.
func (s settings) farPlace(customer, given string) (string, error) {
	switch {
	case given == "":
		return s.besideStore(customer)
	case strings.HasPrefix(given, s3.Scheme):
		s.Store = given
		_, err := s.bucket()
		return given, err
	}
	return filepath.Abs(given)
}

func customerListCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "list", Short: "List customers and where their far stores are", Args: cobra.NoArgs}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		i := installation(cmd)
		st, set, err := i.openStore(cmd)
		if err != nil {
			return err
		}
		defer st.Close(context.Background())
		book, err := i.openBook(cmd.Context(), st, set, nil)
		if err != nil {
			return err
		}
		all, err := book.List(cmd.Context())
		if err != nil {
			return err
		}
		if wantJSON(cmd) {
			return printJSON(cmd, append([]store.Customer{}, all...))
		}
		if len(all) == 0 {
			fmt.Fprintln(cmd.OutOrStdout(), "There are no customers yet: add one with 'muster master customer add NAME'.")
			return nil
		}
		var rows [][]string
		for _, c := range all {
			rows = append(rows, []string{c.Name, when(c.Created), c.Place})
		}
		table(cmd.OutOrStdout(), "NAME SINCE STORE", rows)
		return nil
	}
	return cmd
}

func customerMoveCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "move NAME --store PLACE", Short: "Say where a customer's far store is by now", Args: cobra.ExactArgs(1),
		Long: `Say that a customer's far store is at another place by now: you have copied it there, all of it, while 'muster serve' did not run. It is opened with
the customer's key first.`,
		Example: "  muster master customer move acme --store /mnt/larger/acme"}
	place := cmd.Flags().String("store", "", "folder of the far store, or s3://BUCKET/PREFIX?endpoint=https://HOST")
	passphraseFile := cmd.Flags().String("passphrase-file", "", "file with the master's passphrase, if it has one (default: ask)")
	_ = cmd.MarkFlagRequired("store")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return atDesk(cmd, *passphraseFile, func(d customersDesk) error {
			to, err := d.set.farPlace(args[0], *place)
			if err == nil {
				err = d.book.Move(cmd.Context(), args[0], to)
			}
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "The far store of %s is in %s. Start 'muster serve' again if it runs.\n", args[0], to)
			return nil
		})
	}
	return cmd
}

func customerRemoveCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "remove NAME", Short: "Forget a customer that has no server and no appliance any more", Args: cobra.ExactArgs(1),
		Long: `Forget a customer whose servers are no longer protected and whose appliances have been revoked. Its far store stays where it is, and
its key in the authority: 'muster master customer add NAME --store PLACE' brings it back.

With --erase-key the key is destroyed too, and with it everything in the far store, for good: whoever finds the store later cannot read it. Copies
of the key are in backups of the master that were made before, and on the customer's appliances.`,
		Example: "  muster master customer remove acme\n  muster master customer remove acme --erase-key"}
	erase := cmd.Flags().Bool("erase-key", false, "destroy the customer's key as well: nobody reads its far store any more")
	yes := cmd.Flags().Bool("yes", false, "do not ask")
	passphraseFile := cmd.Flags().String("passphrase-file", "", "file with the master's passphrase, if it has one (default: ask)")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		name := args[0]
		return atDesk(cmd, *passphraseFile, func(d customersDesk) error {
			c, err := d.book.Customer(cmd.Context(), name)
			if err == nil {
				err = d.unused(cmd.Context(), name)
			}
			if err == nil && *erase && !*yes {
				err = confirmErase(cmd, c)
			}
			if err == nil {
				_, err = d.book.Remove(cmd.Context(), name)
			}
			if err == nil && *erase {
				err = d.authority.EraseCustomerKey(name)
			}
			if err != nil {
				return err
			}
			if wantJSON(cmd) {
				return printJSON(cmd, map[string]any{"removed": c, "key_erased": *erase})
			}
			fmt.Fprintf(cmd.OutOrStdout(), "Removed %s. Its far store is still in %s", name, c.Place)
			if *erase {
				fmt.Fprintln(cmd.OutOrStdout(), ", which nobody can read without a copy of the key: delete it when you like.\nStart 'muster serve' again if it runs: until then it may have the store open.")
			} else {
				fmt.Fprintf(cmd.OutOrStdout(), ": 'muster master customer add %s --store %s' brings it back.\n", name, c.Place)
			}
			return nil
		})
	}
	return cmd
}

// unused refuses to remove a customer for whom there is something still.
func (d customersDesk) unused(ctx context.Context, customer string) error {
	nodes, err := d.authority.Nodes()
	if err != nil {
		return err
	}
	for _, n := range nodes {
		if n.Customer == customer && n.State != trust.Revoked {
			return withCode(exitRefused, fmt.Errorf("remove customer %s: its %s %s may still connect: take that back with 'muster master revoke %s'", customer, n.Role, n.Name, n.Name))
		}
	}
	cat, err := catalog.Open(ctx, d.install.catalog(d.set))
	if err != nil {
		return err
	}
	defer cat.Close()
	servers, err := cat.Servers(ctx)
	if err != nil {
		return err
	}
	for _, s := range servers {
		if s.Customer == customer {
			return withCode(exitRefused, fmt.Errorf("remove customer %s: its server %s is still protected: end that with 'muster server remove %s'", customer, s.Name, s.Name))
		}
	}
	return nil
}

func confirmErase(cmd *cobra.Command, c store.Customer) error {
	fmt.Fprintf(cmd.ErrOrStderr(), "Destroy the key of %s, and with it everything in %s, for good? Type the customer's name: ", c.Name, c.Place)
	return confirm(cmd, "remove customer", c.Name)
}

// farDriverOf reaches the far store of a customer, without its key.
func (i install) farDriverOf(cmd *cobra.Command, customer string) (store.Driver, error) {
	st, set, err := i.openStore(cmd)
	if err != nil {
		return nil, err
	}
	defer st.Close(context.Background())
	book, err := i.openBook(cmd.Context(), st, set, nil)
	if err != nil {
		return nil, err
	}
	driver, _, err := farStores{i, set, book}.open(cmd.Context(), customer)
	if errors.Is(err, store.ErrUnknownCustomer) {
		err = withCode(exitNotFound, err)
	}
	return driver, err
}
