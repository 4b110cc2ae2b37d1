package ctlog_test

import (
	"context"
	"errors"
	"net/http"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/ca"
	"github.com/chancery-ca/chancery/ca/ctlog"
	"github.com/chancery-ca/chancery/ca/internal/catest"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/log/ct/cttest" //nolint:depguard // the reference log, which is not ours
)

// pair is two logs for one CA, and both as one group.
func pair(t *testing.T) (first, second *fixture, group *ctlog.Group) {
	t.Helper()
	first, second = newFixture(t), newFixture(t)
	second.chain, second.key = first.chain, first.key
	second.oracle = cttest.New(t, first.chain[1:], cttest.Options{})
	var logs []*ctlog.Log
	for _, f := range []*fixture{first, second} {
		l, err := ctlog.New(f.config())
		if err != nil {
			t.Fatal(err)
		}
		logs = append(logs, l)
	}
	group, err := ctlog.NewGroup(logs...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(group.Close)
	return first, second, group
}

func (f *fixture) authority(t *testing.T, group *ctlog.Group) *ca.Authority {
	t.Helper()
	a, err := ca.New(ca.Config{Key: f.key, Chain: f.chain, Submitter: group, LogKeys: group.Keys(), Now: func() (time.Time, error) { return catest.Noon, nil }})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// TestGroup: one log gives the SCT; when it fails, whatever way, the next does,
// and is then asked first.
func TestGroup(t *testing.T) {
	first, second, group := pair(t)
	a := first.authority(t, group)
	asks := func(what string, wantFirst, wantSecond int64) {
		t.Helper()
		before, beforeSecond := first.asked.Load(), second.asked.Load()
		ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
		defer cancel()
		if _, err := a.Issue(ctx, request(t)); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if n, m := first.asked.Load()-before, second.asked.Load()-beforeSecond; n != wantFirst || m != wantSecond {
			t.Errorf("%s: %d and %d requests, want %d and %d", what, n, m, wantFirst, wantSecond)
		}
		if err := group.Err(); err != nil {
			t.Errorf("%s: Err %v", what, err)
		}
	}
	asks("both answer", 1, 0)
	first.now.Store(&behaviour{spoil: says(http.StatusBadRequest, "", "shard is over")})
	asks("the first refuses", 1, 1)
	asks("the second answered last", 0, 1)
	first.now.Store(new(behaviour))
	second.now.Store(&behaviour{change: set("timestamp", 1)})
	asks("the second gives an old SCT", 1, 1)
}

// TestGroupFails: when all fail, what may pass is said to.
func TestGroupFails(t *testing.T) {
	for _, test := range []struct {
		name          string
		first, second func(http.ResponseWriter, *http.Request) bool
		want          error
	}{
		{"both refuse", says(http.StatusBadRequest, "", ""), says(http.StatusForbidden, "", ""), ca.ErrLog},
		{"one may come back", says(http.StatusBadRequest, "", ""), says(http.StatusServiceUnavailable, "3600", ""), ca.ErrUnavailable},
	} {
		t.Run(test.name, func(t *testing.T) {
			first, second, group := pair(t)
			first.now.Store(&behaviour{spoil: test.first})
			second.now.Store(&behaviour{spoil: test.second})
			if _, err := first.authority(t, group).Issue(t.Context(), request(t)); !errors.Is(err, test.want) {
				t.Errorf("err %v, want %v", err, test.want)
			}
			if group.Err() == nil {
				t.Error("Err is nil")
			}
		})
	}
}

func TestNewGroupRefuses(t *testing.T) {
	log := func(key hsm.Key) *ctlog.Log {
		l, err := ctlog.New(ctlog.Config{URL: "https://ct.example", Key: key.Public(), Now: wallClock})
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	key := hsmtest.SoftwareKey(hsm.ECDSAP256)
	many := make([]*ctlog.Log, 9)
	for i := range many {
		many[i] = log(hsmtest.SoftwareKey(hsm.ECDSAP256))
	}
	for name, logs := range map[string][]*ctlog.Log{"none": nil, "one key twice": {log(key), log(key)}, "nine": many} {
		if _, err := ctlog.NewGroup(logs...); !errors.Is(err, ctlog.ErrConfig) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
