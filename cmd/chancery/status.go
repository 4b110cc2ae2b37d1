package main

import (
	"errors"
	"fmt"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/chancery-ca/chancery/cmd/chancery/internal/service"
)

// errNotReady: the service says so; why is on standard output.
var errNotReady = errors.New("the service is not ready")

func newStatus() *cobra.Command {
	var path string
	var output outputFlag
	cmd := &cobra.Command{
		Use:   "status --config FILE",
		Short: "Ask the running service how it is",
		Long: "Ask the service, at the address of operator in the configuration, whether it is\n" +
			"ready, and which identity providers' keys it has. A provider that cannot be\n" +
			"reached keeps its own users out once its keys are an hour old, and the service\n" +
			"ready.\n\n" +
			"Exit status: 0 ready, 1 not ready or not reached.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := output.check(cmd); err != nil {
				return err
			}
			cfg, err := loadConfig(path)
			if err != nil {
				return err
			}
			if cfg.Operator == "" {
				return hint(errors.New("the configuration has no address for the operator"), "add it and restart the service: operator: 127.0.0.1:9464")
			}
			st, err := service.AskStatus(cmd.Context(), cfg.Operator)
			if errors.Is(err, syscall.ECONNREFUSED) {
				return hint(err, "is the service running? systemctl status chancery")
			}
			if err != nil {
				return err
			}
			if err := output.print(cmd.OutOrStdout(), st, func(p *printer) { p.status(st, time.Now()) }); err != nil {
				return err
			}
			if !st.Ready {
				return errNotReady
			}
			return nil
		},
	}
	addConfigFlag(cmd, &path)
	output.add(cmd)
	return cmd
}

// status prints a status: a row for each thing that is not well, and one for
// each identity provider.
func (p *printer) status(st service.Status, now time.Time) {
	if st.Ready {
		p.row("service", "ready")
	} else {
		p.row("service", "not ready: "+st.Reason)
	}
	for _, w := range st.Warnings {
		p.row("warning", w)
	}
	for _, i := range st.Issuers {
		p.row("issuer", issuerLine(i, now))
	}
}

// issuerLine says how an identity provider is.
func issuerLine(i service.IssuerStatus, now time.Time) string {
	line := i.Issuer + ": " + counted(i.Keys, "key")
	if i.Fetched != nil {
		line += fmt.Sprintf(", fetched %s ago", max(now.Sub(*i.Fetched), 0).Round(time.Second))
	}
	if i.Error != "" {
		line += "; unhealthy: " + i.Error
	}
	return line
}
