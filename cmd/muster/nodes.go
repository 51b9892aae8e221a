package main

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/skip2/go-qrcode"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/durable"
	"github.com/musterdr/muster/internal/trust"
)

// Where an installation keeps who it trusts.
func (i install) trustDir() string  { return i.path("trust") }      // a master: its authority
func (i install) masterKey() string { return i.path("master.key") } // a master: what opens its sealed keys
func (i install) nodeDir() string   { return i.path("node") }       // an appliance or a silo: its key and certificate

// masterPort is where a master listens for nodes unless it is told otherwise.
const masterPort = "7443"

func masterCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "master", Short: "Make this installation the master of others, and say who may connect",
		Long: `A master is reached by appliances and silos on other machines. 'master init' makes its authority, once. 'master enrol' invites
a machine with a token for one use. Who has joined with it has a certificate that renews itself, until 'master revoke'.

These commands work on the installation's folder, whether 'muster serve' runs or not; a running master knows at once.`,
		Example: `  muster master init --address muster.example.com:7443
  muster serve                                              # now listens for nodes as well
  muster master enrol --customer acme --appliance office    # prints a token
  muster appliance join TOKEN                               # on the appliance
  muster master revoke office`}
	cmd.AddCommand(migrateCommand(), backupCommand(), restoreCommand(), masterInitCommand(), masterEnrolCommand(), masterNodesCommand(), masterRevokeCommand(),
		masterCustomerCommand(), masterSeedCommand())
	return cmd
}

func masterInitCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "init", Short: "Make the authority that signs certificates of appliances and silos", Args: cobra.NoArgs,
		Long: `Make the authority of a master in DIR/trust. Its keys, and later those of customers, are sealed there; what opens them is
DIR/master.key, or a passphrase that 'muster serve' is then given by hand or by --passphrase-file.

Copy DIR/trust and what opens it to safe places elsewhere. Without them every node has to be enrolled again.`,
		Example: `  muster master init --address muster.example.com:7443
  muster master init --listen 10.0.0.1:443 --address muster.example.com:443 --name headoffice
  muster master init --passphrase --address muster.example.com:7443`}
	name := cmd.Flags().String("name", "", "the master's name (default: this machine's)")
	listen := cmd.Flags().String("listen", ":"+masterPort, "address for nodes to connect to")
	addresses := cmd.Flags().StringSlice("address", nil, "HOST:PORT by which nodes reach it; several are tried in order (default: this machine's name)")
	keyFile := cmd.Flags().String("key-file", "", "what opens the sealed keys; made unless it is there (default DIR/master.key)")
	ask := cmd.Flags().Bool("passphrase", false, "seal with a passphrase instead, asked for here")
	passphraseFile := cmd.Flags().String("passphrase-file", "", "seal with the passphrase in this file instead")
	cmd.MarkFlagsMutuallyExclusive("key-file", "passphrase", "passphrase-file")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		i := installation(cmd)
		if _, err := i.settings(); err != nil {
			return err
		}
		plan, err := i.plan(*name, *listen, *addresses)
		if err != nil {
			return withCode(exitUsage, err)
		}
		switch {
		case *ask:
			plan.Passphrase, err = newPassphrase(cmd)
		case *passphraseFile != "":
			plan.Passphrase, err = readPassphrase(*passphraseFile)
		case *keyFile != "":
			plan.KeyFile, err = filepath.Abs(*keyFile)
		default:
			plan.KeyFile = i.masterKey()
		}
		if err != nil {
			return err
		}
		if err := trust.Create(i.trustDir(), plan); err != nil {
			return err
		}
		if wantJSON(cmd) {
			return printJSON(cmd, map[string]any{"name": plan.Name, "listen": plan.Listen, "addresses": plan.Addresses, "trust": i.trustDir(), "key_file": plan.KeyFile})
		}
		opens := "the passphrase"
		if plan.KeyFile != "" {
			opens = plan.KeyFile
		}
		fmt.Fprintf(cmd.OutOrStdout(), "Master %s: its authority is in %s.\nCopy that folder and %s to safe places elsewhere, apart from each other: without both every node has to be enrolled again.\n"+
			"Nodes will connect to %s. If they reach this machine by another name, give that to 'muster master enrol --address'.\nNext: start 'muster serve' again, then 'muster master enrol'.\n",
			plan.Name, i.trustDir(), opens, strings.Join(plan.Addresses, ", "))
		return nil
	}
	return cmd
}

// plan fills in what was not said about a master.
func (i install) plan(name, listen string, addresses []string) (trust.Plan, error) {
	host, err := os.Hostname()
	if err != nil || host == "" {
		host = "localhost"
	}
	if name == "" {
		name, _, _ = strings.Cut(strings.ToLower(host), ".")
		if dr.ValidateLabel("master", name) != nil {
			name = "master"
		}
	}
	bound, port, err := net.SplitHostPort(listen)
	if err != nil || port == "" {
		return trust.Plan{}, fmt.Errorf("listen on %q: write ADDRESS:PORT, or :PORT for all addresses", listen)
	}
	if len(addresses) == 0 {
		if ip := net.ParseIP(bound); bound == "" || ip != nil && ip.IsUnspecified() {
			bound = host
		}
		addresses = []string{net.JoinHostPort(bound, port)}
	}
	if err := dr.ValidateLabel("master", name); err != nil {
		return trust.Plan{}, err
	}
	return trust.Plan{Name: name, Listen: listen, Addresses: addresses}, nil
}

// maxPassphrase bounds a passphrase in bytes.
const maxPassphrase = 1024

func readPassphrase(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("read passphrase: %w", err)
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxPassphrase))
	if err != nil {
		return "", fmt.Errorf("read passphrase: %w", err)
	}
	return strings.TrimRight(string(raw), "\r\n"), nil
}

func newPassphrase(cmd *cobra.Command) (string, error) {
	first, err := typedPassphrase(cmd, "New passphrase: ")
	if err != nil {
		return "", err
	}
	second, err := typedPassphrase(cmd, "Again: ")
	if err == nil && first != second {
		err = withCode(exitUsage, errors.New("the two passphrases differ: nothing was changed"))
	}
	return first, err
}

func typedPassphrase(cmd *cobra.Command, prompt string) (string, error) {
	if !term.IsTerminal(int(os.Stdin.Fd())) {
		return "", withCode(exitUsage, errors.New("a passphrase is needed and nobody can be asked: give --passphrase-file"))
	}
	fmt.Fprint(cmd.ErrOrStderr(), prompt)
	raw, err := term.ReadPassword(int(os.Stdin.Fd()))
	fmt.Fprintln(cmd.ErrOrStderr())
	return string(raw), err
}

func masterEnrolCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "enrol", Short: "Invite an appliance or a silo: make a token for one use", Args: cobra.NoArgs,
		Long: `Invite an appliance of a customer, or a silo. The token that is printed lets one machine join, once, as that and nothing else,
until its time is over. It is a secret: carry it as you would carry a password. It can be put on a box before that is shipped
('muster appliance join' needs the master only when it is run), written to a file, or shown as a QR code.

Enrolling a name again makes its earlier token void. When a machine joins with the new one, the certificate that the name had is void too.`,
		Example: `  muster master enrol --customer acme --appliance office
  muster master enrol --customer acme --appliance office --file office.token --qr-file office.png --valid 336h
  muster master enrol --silo silo-1 --qr`}
	customer := cmd.Flags().String("customer", "", "customer whose servers the appliance protects")
	appliance := cmd.Flags().String("appliance", "", "name of the appliance, one on this master")
	silo := cmd.Flags().String("silo", "", "name of the silo, one on this master")
	file := cmd.Flags().String("file", "", "write the token to this new file instead of printing it")
	qr := cmd.Flags().Bool("qr", false, "show it as a QR code on this terminal as well")
	qrFile := cmd.Flags().String("qr-file", "", "write it as a QR code to this new PNG file as well")
	valid := cmd.Flags().Duration("valid", 72*time.Hour, "how long the token is good")
	addresses := cmd.Flags().StringSlice("address", nil, "HOST:PORT by which this node reaches the master (default: as 'master init' was told)")
	cmd.MarkFlagsOneRequired("appliance", "silo")
	cmd.MarkFlagsMutuallyExclusive("appliance", "silo")
	cmd.MarkFlagsMutuallyExclusive("customer", "silo")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		who := trust.Peer{Role: trust.Silo, Name: *silo}
		if *silo == "" {
			who = trust.Peer{Role: trust.Appliance, Customer: *customer, Name: *appliance}
			if err := dr.ValidateLabel("customer", *customer); err != nil {
				return withCode(exitUsage, fmt.Errorf("%w: give --customer", err))
			}
		}
		if err := dr.ValidateLabel(string(who.Role), who.Name); err != nil {
			return withCode(exitUsage, err)
		}
		for _, path := range []string{*file, *qrFile} {
			if err := absent(path); err != nil {
				return err
			}
		}
		if who.Role == trust.Appliance { // one that could send nowhere is better not shipped
			if _, err := installation(cmd).farDriverOf(cmd, who.Customer); err != nil {
				return err
			}
		}
		book, err := trust.OpenRegistry(installation(cmd).trustDir())
		if err != nil {
			return err
		}
		token, err := book.Enrol(who, *valid, *addresses)
		if err != nil {
			return err
		}
		return showToken(cmd, token, *file, *qrFile, *qr)
	}
	return cmd
}

// absent refuses a path where something is.
func absent(path string) error {
	if path == "" {
		return nil
	}
	if _, err := os.Lstat(path); err == nil {
		return withCode(exitRefused, fmt.Errorf("%s is there already: nothing was changed", path))
	}
	return nil
}

// pngSize is the width of a QR code's picture in pixels.
const pngSize = 512

// showToken gives a token to where it is wanted. What is printed on standard output is the token alone.
func showToken(cmd *cobra.Command, token trust.Token, file, qrFile string, qr bool) error {
	code, err := qrcode.New(token.String(), qrcode.Low) // it is read from a screen or clean paper; small is more
	if err != nil {
		return fmt.Errorf("draw QR code: %w", err)
	}
	if file != "" {
		text := fmt.Sprintf("# Muster: lets one machine join as %s, once, until %s. A secret.\n%s\n", token.Peer, when(token.Expires), token)
		if err := durable.WriteFile(file, []byte(text), 0o600); err != nil {
			return err
		}
	}
	if qrFile != "" {
		png, err := code.PNG(pngSize)
		if err != nil {
			return fmt.Errorf("draw QR code: %w", err)
		}
		if err := durable.WriteFile(qrFile, png, 0o600); err != nil {
			return err
		}
	}
	if wantJSON(cmd) {
		return printJSON(cmd, map[string]any{"role": token.Peer.Role, "customer": token.Peer.Customer, "name": token.Peer.Name, "expires": token.Expires,
			"masters": token.Masters, "pin": base64.RawURLEncoding.EncodeToString(token.Pin[:]), "token": token.String(), "file": file, "qr_file": qrFile})
	}
	if qr {
		fmt.Fprint(cmd.ErrOrStderr(), code.ToSmallString(false))
	}
	given := token.String()
	if file == "" {
		fmt.Fprintln(cmd.OutOrStdout(), given)
		given = "TOKEN"
	} else {
		given = "--file " + filepath.Base(file)
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "\nFor %s, once, until %s. On that machine: muster %s join %s\n", token.Peer, when(token.Expires), token.Peer.Role, given)
	return nil
}

func masterNodesCommand() *cobra.Command {
	return &cobra.Command{Use: "nodes", Short: "List who may connect to this master", Args: cobra.NoArgs, Example: "  muster master nodes",
		RunE: func(cmd *cobra.Command, _ []string) error {
			book, err := trust.OpenRegistry(installation(cmd).trustDir())
			if err != nil {
				return err
			}
			nodes, err := book.Nodes()
			if err != nil {
				return err
			}
			if wantJSON(cmd) {
				return printJSON(cmd, nodes)
			}
			if len(nodes) == 0 {
				fmt.Fprintln(cmd.OutOrStdout(), "Nobody yet: invite one with 'muster master enrol'.")
				return nil
			}
			var rows [][]string
			for _, n := range nodes {
				rows = append(rows, []string{n.Name, string(n.Role), orDash(n.Customer), string(n.State), whenOrDash(n.Joined), whenOrDash(n.Expires), whenOrDash(n.Invited)})
			}
			table(cmd.OutOrStdout(), "NAME ROLE CUSTOMER STATE JOINED CERTIFICATE-UNTIL TOKEN-UNTIL", rows)
			return nil
		}}
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func whenOrDash(t *time.Time) string {
	if t == nil {
		return "-"
	}
	return when(*t)
}

func masterRevokeCommand() *cobra.Command {
	return &cobra.Command{Use: "revoke NAME", Short: "Shut an appliance or a silo out, at once", Args: cobra.ExactArgs(1),
		Long: `Shut a node out: its connections are cut, its certificates and tokens are refused. What it has sent stays. An appliance still has
its customer's key and what it captured; if it was stolen, see docs/operator/enrolment.md. 'muster master enrol' lets the name in again.`,
		Example:           "  muster master revoke office",
		ValidArgsFunction: completeNodes,
		RunE: func(cmd *cobra.Command, args []string) error {
			book, err := trust.OpenRegistry(installation(cmd).trustDir())
			if err != nil {
				return err
			}
			node, err := book.Revoke(args[0])
			if err != nil {
				return err
			}
			if wantJSON(cmd) {
				return printJSON(cmd, node)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s is revoked.\n", trust.Peer{Role: node.Role, Customer: node.Customer, Name: node.Name})
			return nil
		}}
}

// completeNodes gives the names that a shell may complete to.
func completeNodes(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	var names []string
	if book, err := trust.OpenRegistry(installation(cmd).trustDir()); err == nil && len(args) == 0 {
		nodes, _ := book.Nodes()
		for _, n := range nodes {
			names = append(names, n.Name+"\t"+string(n.State))
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

func applianceCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "appliance", Short: "Make this machine an appliance of a master, and run it"}
	cmd.AddCommand(applianceServeCommand(), applianceSetCommand(), applianceStatusCommand(), applianceSeedCommand(), applianceListCommand())
	cmd.AddCommand(joinCommand(trust.Appliance, "  muster appliance join muster1.appliance.acme.office.…\n  muster appliance join --file office.token"))
	return cmd
}

// maxTokenFile bounds a file with a token in bytes.
const maxTokenFile = 4096

func joinCommand(role trust.Role, example string) *cobra.Command {
	cmd := &cobra.Command{Use: "join TOKEN", Short: "Join a master with a token of 'muster master enrol'", Args: cobra.MaximumNArgs(1),
		Long: `Join a master: make a key, which never leaves this machine, and get a certificate for it. Both lie in DIR/node from then on, and the
certificate renews itself while this machine reaches the master at least once in some days. Only connections outward are made.

If the connection breaks off, run it again with the same token.`,
		Example: example}
	file := cmd.Flags().String("file", "", "read the token from this file; - is standard input")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		text, err := tokenText(cmd, args, *file)
		if err != nil {
			return err
		}
		token, err := trust.ParseToken(text)
		if err != nil {
			return withCode(exitUsage, err)
		}
		if token.Peer.Role != role {
			return withCode(exitUsage, fmt.Errorf("the token is for %s: use 'muster %s join'", token.Peer, token.Peer.Role))
		}
		i := installation(cmd)
		if err := os.MkdirAll(i.Dir, 0o711); err != nil {
			return fmt.Errorf("make folder: %w", err)
		}
		node, err := trust.Join(cmd.Context(), i.nodeDir(), token)
		var unreached *net.OpError
		if errors.As(err, &unreached) {
			return withCode(exitUnavailable, fmt.Errorf("%w; is the address right, does 'muster serve' run there, and does a firewall let this machine out to it?", err))
		}
		if err != nil {
			return err
		}
		if wantJSON(cmd) {
			return printJSON(cmd, map[string]any{"role": node.Peer().Role, "customer": node.Peer().Customer, "name": node.Peer().Name,
				"serial": node.Peer().Serial, "expires": node.Expires(), "master": node.Master(), "dir": i.nodeDir()})
		}
		fmt.Fprintf(cmd.OutOrStdout(), "This machine is %s on master %s. Its certificate is good until %s and renews itself.\n", node.Peer(), node.Master(), when(node.Expires()))
		return nil
	}
	return cmd
}

func tokenText(cmd *cobra.Command, args []string, file string) (string, error) {
	if (len(args) == 1) == (file != "") {
		return "", withCode(exitUsage, fmt.Errorf("give the token, or --file with where it is; see '%s --help'", cmd.CommandPath()))
	}
	if file == "" {
		return args[0], nil
	}
	in := cmd.InOrStdin()
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return "", fmt.Errorf("read token: %w", err)
		}
		defer f.Close()
		in = f
	}
	raw, err := io.ReadAll(io.LimitReader(in, maxTokenFile+1))
	if err != nil {
		return "", fmt.Errorf("read token: %w", err)
	}
	return string(raw), nil
}
