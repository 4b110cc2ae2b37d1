package service

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"github.com/labstack/echo/v4"
	"github.com/labstack/echo/v4/middleware"

	"github.com/chancery-ca/chancery/hsm"
)

// phase is where in its life the service is.
type phase int32

const (
	starting phase = iota
	serving
	draining
)

type readiness struct{ phase atomic.Int32 }

func (r *readiness) set(p phase) { r.phase.Store(int32(p)) }

// Ready returns nil when a request of every kind would be answered, else why
// not. It reads memory only: no token and no disk is touched, and a CT log
// elsewhere is known by how it answered the newest certificate.
func (s *Service) Ready() error {
	switch phase(s.state.phase.Load()) {
	case starting:
		return errors.New("starting")
	case draining:
		return errors.New("shutting down")
	}
	if _, err := s.clock.Now(); err != nil {
		return err
	}
	var errs []error
	errs = append(errs, s.tokenErr())
	if s.audit != nil {
		errs = append(errs, s.audit.Err())
	}
	if s.elsewhere != nil {
		errs = append(errs, prefixed("CT log elsewhere", s.elsewhere.Err()))
	}
	if s.tuf != nil {
		errs = append(errs, prefixed("TUF", s.tuf.Err()))
	}
	for _, l := range s.logs {
		errs = append(errs, prefixed(l.name, l.tree.Err()), prefixed(l.name, l.heads.Err()))
	}
	return errors.Join(errs...)
}

func prefixed(part string, err error) error {
	if err == nil {
		return nil
	}
	return errors.New(part + ": " + err.Error())
}

// status is the body of a gateway-style error, as every Sigstore client
// expects it.
type status struct {
	Code    int      `json:"code"`
	Message string   `json:"message"`
	Details []string `json:"details"`
}

// newEcho makes the echo instance on which every package registers its routes.
func (s *Service) newEcho() *echo.Echo {
	e := echo.New()
	e.HideBanner, e.HidePort = true, true
	e.HTTPErrorHandler = s.fallback
	e.Use(middleware.RecoverWithConfig(middleware.RecoverConfig{
		LogErrorFunc: func(c echo.Context, err error, stack []byte) error {
			s.log.Error("request panicked", "err", err, "stack", string(stack))
			return echo.ErrInternalServerError
		},
	}))
	return e
}

// fallback answers what no package answered itself: unknown paths and methods
// (as the gateway of the public service does) and panics.
func (s *Service) fallback(err error, c echo.Context) {
	if c.Response().Committed {
		return
	}
	code, body := http.StatusInternalServerError, status{Code: 13, Message: "internal error"}
	var he *echo.HTTPError
	if errors.As(err, &he) {
		switch he.Code {
		case http.StatusNotFound:
			code, body = he.Code, status{Code: 5, Message: "Not Found"}
		case http.StatusMethodNotAllowed:
			code, body = http.StatusNotImplemented, status{Code: 12, Message: "Method Not Allowed"}
		case http.StatusInternalServerError:
		default:
			code, body = he.Code, status{Code: 3, Message: http.StatusText(he.Code)}
		}
	} else {
		s.log.Error("request failed", "err", err)
	}
	body.Details = []string{}
	if err := c.JSON(code, body); err != nil {
		s.log.Debug("answer not sent", "err", err)
	}
}

// registerHealth adds /healthz (the process answers) and /readyz (every part
// could serve a request now; the reasons are for the operator's log only).
func (s *Service) registerHealth() {
	s.echo.GET("/healthz", func(c echo.Context) error {
		return c.JSON(http.StatusOK, map[string]string{"status": "SERVING"})
	})
	s.echo.GET("/readyz", func(c echo.Context) error {
		if err := s.Ready(); err != nil {
			s.log.Warn("not ready", "err", err)
			c.Response().Header().Set("Retry-After", "1")
			return c.JSON(http.StatusServiceUnavailable, map[string]string{"status": "NOT_SERVING"})
		}
		answer := map[string]string{"status": "SERVING"}
		if warnings := s.warnings(); len(warnings) > 0 {
			answer["warning"] = strings.Join(warnings, "; ")
		}
		return c.JSON(http.StatusOK, answer)
	})
}

// warnings is what an operator should see to though every request is answered;
// the reasons are in the log.
func (s *Service) warnings() []string {
	var warnings []string
	if s.tuf != nil && s.tuf.Expiring() != nil {
		warnings = append(warnings, "TUF metadata expires soon")
	}
	if s.crlDue() {
		warnings = append(warnings, "the list of revoked certificates is past its next update")
	}
	if s.cfg.CT.Frozen {
		warnings = append(warnings, "the CT log is frozen: no certificate is issued")
	}
	for _, name := range s.unreadable {
		warnings = append(warnings, "frozen log "+name+": does not verify")
	}
	for _, l := range s.logs {
		if l.heads.CounterErr() != nil {
			warnings = append(warnings, "log "+l.name+": hardware counter does not follow")
		}
	}
	return warnings
}

// Watch looks at the tokens every interval. It calls alive while waiting can
// still help; while a call into a token's library hangs it does not, so that
// the process's watchdog restarts it. When a token was lost and refused the PIN
// on its return, Watch returns the ErrPIN: nothing in this process may log in
// again. It returns nil when ctx ends.
func (s *Service) Watch(ctx context.Context, interval time.Duration, alive func()) error {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		err := s.tokenErr()
		switch {
		case errors.Is(err, hsm.ErrPIN):
			return err
		case errors.Is(err, hsm.ErrWedged):
			s.log.Error("watchdog not fed", "err", err)
		default:
			alive()
		}
	}
}

// tokenErr returns why a token does not sign, nil if all do.
func (s *Service) tokenErr() error {
	var errs []error
	for name, token := range s.tokens {
		if err := token.Err(); err != nil {
			errs = append(errs, fmt.Errorf("token %s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}
