package main

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/durable"
)

// sshKey is where an installation has the key with which it logs in on servers for which no other was named.
func (i install) sshKey() string { return i.path("ssh.key") }

// makeSSHKey makes it, unless it is there, and gives its public half. Only who holds the installation's lock calls it.
func (i install) makeSSHKey(owner string) (string, error) {
	public, err := i.publicSSHKey()
	if !errors.Is(err, os.ErrNotExist) {
		return public, err
	}
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return "", fmt.Errorf("make SSH key: %w", err)
	}
	block, err := ssh.MarshalPrivateKey(key, "muster-"+owner)
	if err != nil {
		return "", fmt.Errorf("make SSH key: %w", err)
	}
	if err := durable.WriteFile(i.sshKey(), pem.EncodeToMemory(block), 0o600); err != nil {
		return "", err
	}
	return i.publicSSHKey()
}

// publicSSHKey gives the line for authorized_keys, without a comment.
func (i install) publicSSHKey() (string, error) {
	raw, err := os.ReadFile(i.sshKey())
	if err != nil {
		return "", fmt.Errorf("read SSH key: %w", err)
	}
	signer, err := ssh.ParsePrivateKey(raw)
	if err != nil {
		return "", fmt.Errorf("read SSH key %s: %w; move it away for a new one to be made", i.sshKey(), err)
	}
	return authorizedLine(signer.PublicKey()), nil
}

func authorizedLine(key ssh.PublicKey) string {
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key)))
}

func applianceKeyCommand() *cobra.Command {
	return &cobra.Command{Use: "key [NAME]", Short: "Print the line for authorized_keys that lets an appliance log in on a server", Args: cobra.MaximumNArgs(1),
		Long: `Print the public half of the SSH key that an appliance has made for itself. Its private half never leaves the appliance. A server that is added
without --key is logged in on with it: put the line into the authorized_keys of the server's user before.

With NAME it is asked of the master, which every appliance tells it. Without one it is the key of this machine's own installation, which
'muster serve' or 'muster appliance serve' makes when it is first started.`,
		Example: `  muster appliance key office
  muster appliance key office | ssh root@10.1.0.5 'mkdir -p -m 700 .ssh && cat >> .ssh/authorized_keys'`,
		ValidArgsFunction: completeAppliances,
		RunE: func(cmd *cobra.Command, args []string) error {
			line, owner, err := applianceKey(cmd, args)
			if err != nil {
				return err
			}
			if wantJSON(cmd) {
				return printJSON(cmd, map[string]string{"appliance": owner, "ssh_key": line})
			}
			fmt.Fprintln(cmd.OutOrStdout(), line, "muster-"+owner)
			return nil
		}}
}

func applianceKey(cmd *cobra.Command, args []string) (line, owner string, err error) {
	if len(args) == 0 {
		line, err = installation(cmd).publicSSHKey()
		if errors.Is(err, os.ErrNotExist) {
			err = withCode(exitUnavailable, fmt.Errorf("%s has no SSH key yet: 'muster serve', or 'muster appliance serve', makes it when it is first started", installation(cmd).Dir))
		}
		return line, "own", err
	}
	c := client(cmd)
	defer c.Close()
	list, err := c.Appliances(cmd.Context())
	if err != nil {
		return "", "", err
	}
	for _, a := range list {
		if a.Name != args[0] {
			continue
		}
		// It came from another machine, and goes where a line more would let somebody else in.
		key, _, options, rest, err := ssh.ParseAuthorizedKey([]byte(a.Hello.SSHKey))
		if err != nil || len(options) > 0 || len(strings.TrimSpace(string(rest))) > 0 {
			return "", "", withCode(exitUnavailable, fmt.Errorf("appliance %s has told no SSH key yet: see 'muster appliance list', and that it runs this release", a.Name))
		}
		return authorizedLine(key), a.Name, nil
	}
	return "", "", api.Errorf(api.NotFound, "there is no appliance %q: see 'muster appliance list'", args[0])
}
