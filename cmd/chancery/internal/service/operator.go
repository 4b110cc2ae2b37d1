package service

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/net/netutil"

	"github.com/chancery-ca/chancery/ca/identity"
)

// The paths for the operator, on a listener of their own that only this machine
// reaches. What they say is not for clients.
const (
	PathStatus  = "/status"
	PathMetrics = "/metrics"
)

// maxOperators bounds the open connections of that listener.
const maxOperators = 16

// Status is what the operator sees of a running service, beyond what /readyz
// tells everybody.
type Status struct {
	Ready bool `json:"ready"`
	// Reason says why the service is not ready.
	Reason string `json:"reason,omitempty"`
	// Warnings are those of /readyz.
	Warnings []string `json:"warnings,omitempty"`
	// Issuers are the identity providers, in order of their URLs. One of which
	// no key is known keeps its own users out, and the service ready.
	Issuers []IssuerStatus `json:"issuers"`
}

// IssuerStatus is the state of an identity provider's keys.
type IssuerStatus struct {
	Issuer string `json:"issuer"`
	// Pattern is the meta-issuer that it fits, "" for one that is configured.
	Pattern string `json:"pattern,omitempty"`
	// Keys is how many usable keys are known, Fetched when they were fetched.
	Keys    int        `json:"keys"`
	Fetched *time.Time `json:"fetched,omitempty"`
	// Error is why the last fetch went wrong, "" if it did not.
	Error string `json:"error,omitempty"`
}

// Healthy says whether tokens of the issuer can be verified, and go on to be.
func (i IssuerStatus) Healthy() bool { return i.Keys > 0 && i.Error == "" }

// Status returns the state of the service. It reads memory only.
func (s *Service) Status() Status {
	st := Status{Ready: true, Warnings: s.warnings(), Issuers: []IssuerStatus{}}
	if err := s.Ready(); err != nil {
		st.Ready, st.Reason = false, err.Error()
	}
	if s.identity == nil { // a CT log alone
		return st
	}
	for _, h := range s.identity.Health() {
		st.Issuers = append(st.Issuers, issuerStatus(h))
	}
	return st
}

func issuerStatus(h identity.IssuerHealth) IssuerStatus {
	i := IssuerStatus{Issuer: h.Issuer, Pattern: h.Pattern, Keys: h.Keys}
	if !h.Fetched.IsZero() {
		at := h.Fetched.UTC()
		i.Fetched = &at
	}
	if h.Err != nil {
		i.Error = h.Err.Error()
	}
	return i
}

// operatorHandler answers the operator. It answers only those who ask for an
// address, or for localhost: a page in a browser on this machine whose host name
// leads here (DNS rebinding) asks for that name.
func (s *Service) operatorHandler() http.Handler {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collector{s})
	mux := http.NewServeMux()
	mux.Handle("GET "+PathMetrics, promhttp.HandlerFor(registry, promhttp.HandlerOpts{DisableCompression: true}))
	mux.HandleFunc("GET "+PathStatus, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if err := json.NewEncoder(w).Encode(s.Status()); err != nil {
			s.log.Debug("status not sent", "err", err)
		}
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !asksForAddress(r.Host) {
			http.Error(w, "ask for an address", http.StatusForbidden)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

func asksForAddress(hostPort string) bool {
	host, _, err := net.SplitHostPort(hostPort)
	if err != nil {
		host = hostPort
	}
	_, err = netip.ParseAddr(host)
	return err == nil || host == "localhost"
}

// serveOperator opens the operator's listener, if one is configured. stop closes
// it.
func (s *Service) serveOperator() (stop func(), err error) {
	if s.cfg.Operator == "" {
		return func() {}, nil
	}
	l, err := net.Listen("tcp", s.cfg.Operator)
	if err != nil {
		return nil, fmt.Errorf("listen for the operator: %w", err)
	}
	server := newServer(s.operatorHandler(), edgeLimits, s.log)
	var done sync.WaitGroup
	done.Go(func() {
		if err := server.Serve(netutil.LimitListener(l, maxOperators)); !errors.Is(err, http.ErrServerClosed) {
			s.log.Error("operator's listener ended", "err", err)
		}
	})
	s.log.Info("serving the operator", "listen", l.Addr().String())
	return func() {
		_ = server.Close() // nobody's answer is worth waiting for
		done.Wait()
	}, nil
}

// collector makes metrics of the service's state when they are asked for. Every
// label is a name of the configuration: issuers by a pattern count together,
// under the pattern.
type collector struct{ service *Service }

var (
	readyDesc = prometheus.NewDesc("chancery_ready", "1 if every request would be answered, as /readyz says.", nil, nil)
	upDesc    = prometheus.NewDesc("chancery_issuer_up",
		"1 if the keys of the identity provider, or of all that were met by the pattern, are known and the last fetch went well.", []string{"issuer"}, nil)
	keysDesc    = prometheus.NewDesc("chancery_issuer_keys", "Usable keys of the identity provider; by a pattern the fewest of one.", []string{"issuer"}, nil)
	ageDesc     = prometheus.NewDesc("chancery_issuer_keys_age_seconds", "Time since the keys were fetched; by a pattern the oldest.", []string{"issuer"}, nil)
	membersDesc = prometheus.NewDesc("chancery_issuer_members", "Identity providers that were met by the pattern.", []string{"issuer"}, nil)
)

// Describe implements prometheus.Collector.
func (collector) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{readyDesc, upDesc, keysDesc, ageDesc, membersDesc} {
		out <- d
	}
}

// Collect implements prometheus.Collector.
func (c collector) Collect(out chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, value float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value, labels...)
	}
	st := c.service.Status()
	gauge(readyDesc, number(st.Ready))
	for name, g := range group(st.Issuers, time.Now()) {
		gauge(upDesc, number(g.up), name)
		gauge(keysDesc, float64(g.keys), name)
		if g.fetched {
			gauge(ageDesc, g.age.Seconds(), name)
		}
		if g.pattern {
			gauge(membersDesc, float64(g.members), name)
		}
	}
}

func number(yes bool) float64 {
	if yes {
		return 1
	}
	return 0
}

// issuerGroup is one issuer, or all that were met by a pattern.
type issuerGroup struct {
	up, pattern, fetched bool
	keys, members        int
	age                  time.Duration
}

// group puts issuers together under the names that the configuration has.
func group(issuers []IssuerStatus, now time.Time) map[string]issuerGroup {
	out := map[string]issuerGroup{}
	for _, i := range issuers {
		name := i.Issuer
		if i.Pattern != "" {
			name = i.Pattern
		}
		g, met := out[name]
		if !met {
			g = issuerGroup{up: true, pattern: i.Pattern != "", keys: i.Keys}
		}
		g.members++
		g.up, g.keys = g.up && i.Healthy(), min(g.keys, i.Keys)
		if i.Fetched != nil {
			g.fetched, g.age = true, max(g.age, now.Sub(*i.Fetched))
		}
		out[name] = g
	}
	return out
}

// AskStatus asks a running service at its operator's address for its status.
func AskStatus(ctx context.Context, address string) (st Status, err error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+PathStatus, nil)
	if err != nil {
		return st, fmt.Errorf("ask for status: %w", err)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}} // no proxy
	resp, err := client.Do(req)
	if err != nil {
		return st, fmt.Errorf("ask for status: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return st, fmt.Errorf("ask for status: status %d", resp.StatusCode)
	}
	if err := json.NewDecoder(http.MaxBytesReader(nil, resp.Body, maxStatus)).Decode(&st); err != nil {
		return st, fmt.Errorf("ask for status: %w", err)
	}
	return st, nil
}

const (
	// askTime bounds AskStatus.
	askTime = 10 * time.Second
	// maxStatus bounds a status, in octets.
	maxStatus = 4 << 20
)
