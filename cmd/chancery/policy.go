package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/chancery-ca/chancery/ca/identity"
	"github.com/chancery-ca/chancery/ca/policy"
	"github.com/chancery-ca/chancery/ca/profile"
	"github.com/chancery-ca/chancery/cmd/chancery/internal/service"
	"github.com/chancery-ca/chancery/config"
)

// verifyTimeout bounds the wait for an identity provider's keys.
const verifyTimeout = 15 * time.Second

func newPolicy() *cobra.Command {
	var path string
	var output outputFlag
	cmd := &cobra.Command{
		Use:   "policy --config FILE",
		Short: "Show who may have a certificate, and explain a decision",
		Long: "Show the rules of the policy in the order in which they are asked. The first that\n" +
			"fits decides; what none fits is refused. No token is touched.\n\n" +
			"chancery policy test explains what the policy says to an ID token.",
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return &usageError{fmt.Errorf("unknown command %q", args[0]), cmd.CommandPath()}
			}
			if err := output.check(cmd); err != nil {
				return err
			}
			cfg, err := loadAuthority(path)
			if err != nil {
				return err
			}
			rules := ruleList(&cfg.CA)
			return output.print(cmd.OutOrStdout(), rules, func(p *printer) { p.rules(rules) })
		},
	}
	addConfigFlag(cmd, &path)
	output.add(cmd)
	cmd.AddCommand(newPolicyTest())
	return cmd
}

// loadAuthority loads the configuration of a service that has a certificate
// authority.
func loadAuthority(path string) (*config.Config, error) {
	cfg, err := loadConfig(path)
	if err == nil && cfg.Only == config.OnlyCT {
		err = errors.New("this service is a CT log alone: it has no policy and no audit")
	}
	return cfg, err
}

// ruleView is a rule as `chancery policy` shows it.
type ruleView struct {
	Name     string            `json:"name"`
	Effect   policy.Effect     `json:"effect"`
	Issuer   string            `json:"issuer,omitempty"`
	Identity string            `json:"identity,omitempty"`
	Claims   map[string]string `json:"claims,omitempty"`
	Keys     []string          `json:"keys,omitempty"`
	// Lifetime is that of the rule's certificates, in seconds.
	Lifetime int64 `json:"lifetimeSeconds,omitempty"`
}

// ruleList is the policy of a checked configuration.
func ruleList(ca *config.CA) []ruleView {
	list := []ruleView{}
	for _, r := range ca.Policy {
		v := ruleView{Name: r.Allow, Effect: policy.Allow, Issuer: r.Issuer, Identity: r.Identity, Claims: r.Claims, Keys: r.Keys}
		if r.Deny != "" {
			v.Name, v.Effect = r.Deny, policy.Deny
		} else {
			v.Lifetime = int64(lifetimeOf(ca, r.Lifetime).Seconds())
		}
		list = append(list, v)
	}
	return list
}

// lifetimeOf is how long a certificate lives under a rule.
func lifetimeOf(ca *config.CA, rule time.Duration) time.Duration {
	if rule == 0 {
		return ca.Lifetime
	}
	return min(ca.Lifetime, rule)
}

func (p *printer) rules(list []ruleView) {
	if len(list) == 0 {
		p.row("policy", "none: everybody with a valid token of a configured issuer is allowed")
		return
	}
	for _, r := range list {
		p.row(string(r.Effect), r.Name)
		p.row("issuer", r.Issuer)
		p.row("identity", r.Identity)
		for _, name := range slices.Sorted(maps.Keys(r.Claims)) {
			p.row("claim", name+" is "+r.Claims[name])
		}
		p.row("keys", strings.Join(r.Keys, ", "))
		if r.Lifetime > 0 {
			p.row("lifetime", (time.Duration(r.Lifetime) * time.Second).String())
		}
		p.printf("\n")
	}
	p.row("otherwise", "refused")
}

func newPolicyTest() *cobra.Command {
	var t policyTest
	cmd := &cobra.Command{
		Use:   "test FILE|- --config FILE",
		Short: "Explain what the policy says to an ID token",
		Long: "Read an ID token from a file, or from standard input (-), verify it as the service\n" +
			"would, with the keys of its issuer, and say which identity a certificate would\n" +
			"carry, which rule decides, and what did not fit the rules before. Nothing is\n" +
			"issued, and no claim is shown but those that go into the certificate.\n\n" +
			"--unverified reads the claims alone and asks nobody, for a token that has expired\n" +
			"or was written by hand. Its answer says nothing about who wrote the token.\n\n" +
			"Exit status: 0 allowed, 1 refused.",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return t.run(cmd, args[0]) },
	}
	addConfigFlag(cmd, &t.config)
	cmd.Flags().StringVar(&t.key, "key", "ecdsa-p256", "`type` of the key to certify: "+strings.Join(policy.KeyTypes(), ", "))
	cmd.Flags().BoolVar(&t.unverified, "unverified", false, "do not check the token's signature")
	t.output.add(cmd)
	return cmd
}

// policyTest is one explanation.
type policyTest struct {
	config, key string
	unverified  bool
	output      outputFlag
}

// explanation is what `chancery policy test` says.
type explanation struct {
	Allowed bool `json:"allowed"`
	// Verified says whether the token's signature was checked.
	Verified bool            `json:"verified"`
	Issuer   string          `json:"issuer,omitempty"`
	SANType  profile.SANType `json:"sanType,omitempty"`
	SAN      string          `json:"san,omitempty"`
	Key      string          `json:"key"`
	// Rule decided; Reason is a sentence.
	Rule   string `json:"rule,omitempty"`
	Reason string `json:"reason"`
	// Lifetime is that of the certificate, in seconds.
	Lifetime int64      `json:"lifetimeSeconds,omitempty"`
	Rules    []ruleStep `json:"rules"`
	// Warning is what is wrong with a token whose signature was not checked.
	Warning string `json:"warning,omitempty"`
}

// ruleStep is a rule and what became of it.
type ruleStep struct {
	Name   string        `json:"name"`
	Effect policy.Effect `json:"effect"`
	Asked  bool          `json:"asked"`
	Fits   bool          `json:"fits"`
	// Missed is the first part of the rule that did not fit; "key" if it fits and
	// does not allow the key.
	Missed string `json:"missed,omitempty"`
}

// errRefused: the answer was no, and was printed.
var errRefused = errors.New("refused")

func (t policyTest) run(cmd *cobra.Command, file string) error {
	if err := t.output.check(cmd); err != nil {
		return err
	}
	if !slices.Contains(policy.KeyTypes(), t.key) {
		return &usageError{fmt.Errorf("--key %q: want %s", t.key, strings.Join(policy.KeyTypes(), ", ")), cmd.CommandPath()}
	}
	cfg, err := loadAuthority(t.config)
	if err != nil {
		return err
	}
	token, err := tokenFrom(file, cmd.InOrStdin())
	if err != nil {
		return err
	}
	e, err := t.explain(cmd.Context(), cfg, token, quiet(cmd))
	if err != nil {
		return policyHint(err)
	}
	if err := t.output.print(cmd.OutOrStdout(), e, func(p *printer) { p.explained(e) }); err != nil {
		return err
	}
	if !e.Allowed {
		return fmt.Errorf("%w: %s", errRefused, e.Reason)
	}
	return nil
}

// policyHint says what to do about a token that got no answer.
func policyHint(err error) error {
	switch {
	case errors.Is(err, identity.ErrUnavailable):
		return hint(err, "its keys could not be fetched from here; --unverified asks nobody")
	case errors.Is(err, identity.ErrToken):
		return hint(err, "the service would answer 400; --unverified reads the claims all the same")
	}
	return err
}

// tokenFrom reads a token from a file, or from stdin for "-". It is never an
// argument or a variable, which others can see.
func tokenFrom(file string, stdin io.Reader) (string, error) {
	if file == "-" {
		return readToken(stdin)
	}
	f, err := os.Open(file)
	if err != nil {
		return "", fmt.Errorf("open token: %w", err)
	}
	defer f.Close()
	return readToken(f)
}

// explain asks the policy what the service would ask it.
func (t policyTest) explain(ctx context.Context, cfg *config.Config, token string, logger *slog.Logger) (*explanation, error) {
	rules, err := cfg.CA.Rules()
	if err != nil {
		return nil, err
	}
	read, err := identity.ReadUnverified(cfg.CA.Config, token, time.Now())
	if err != nil {
		return nil, err
	}
	e := &explanation{Verified: !t.unverified, Key: t.key, Issuer: read.Issuer, SANType: read.SAN.Type, SAN: read.SAN.Value}
	subject := policy.Subject{Issuer: read.Issuer, SAN: read.SAN, Claim: read.Claim, Key: t.key}
	if t.unverified && read.Err != nil {
		e.Warning = read.Err.Error()
	}
	if !t.unverified {
		p, err := service.VerifyToken(ctx, cfg, token, verifyTimeout, logger)
		if err != nil {
			return nil, err
		}
		subject.Issuer, subject.SAN, subject.Claim = p.Issuer, p.SAN, p.Claim
	}
	e.decided(&cfg.CA, rules.Decide(subject))
	return e, nil
}

// decided fills in the decision.
func (e *explanation) decided(ca *config.CA, d policy.Decision) {
	e.Allowed, e.Rule, e.Reason = d.Allowed, d.Rule, d.Reason
	if d.Allowed {
		e.Lifetime = int64(lifetimeOf(ca, d.Lifetime).Seconds())
	}
	e.Rules = []ruleStep{}
	for i, r := range ruleList(ca) {
		step := ruleStep{Name: r.Name, Effect: r.Effect}
		if i < len(d.Trace) {
			step.Asked, step.Fits, step.Missed = true, d.Trace[i].Fits, d.Trace[i].Missed
		}
		if step.Fits && step.Effect == policy.Allow && !d.Allowed {
			step.Missed = "key"
		}
		e.Rules = append(e.Rules, step)
	}
}

func (p *printer) explained(e *explanation) {
	p.row("identity", fmt.Sprintf("%s (%s)", e.SAN, e.SANType))
	p.row("issuer", e.Issuer)
	if e.Verified {
		p.row("token", "verified")
	} else {
		p.row("token", "NOT verified: anybody can have written it")
		p.row("", e.Warning)
	}
	p.row("key", e.Key)
	for _, r := range e.Rules {
		p.row("rule", fmt.Sprintf("%s, %s: %s", r.Name, r.Effect, r.outcome()))
	}
	answer := "refused"
	if e.Allowed {
		answer = "allowed"
	}
	p.row("decision", answer+": "+e.Reason)
	if e.Allowed {
		p.row("lifetime", (time.Duration(e.Lifetime) * time.Second).String())
	}
}

func (r ruleStep) outcome() string {
	switch {
	case !r.Asked:
		return "not asked"
	case r.Fits && r.Missed != "":
		return "fits, and does not allow the " + r.Missed
	case r.Fits:
		return "fits"
	}
	return r.Missed + " does not fit"
}
