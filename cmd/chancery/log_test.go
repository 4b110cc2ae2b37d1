package main

import (
	"bytes"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/chancery-ca/chancery/cmd/chancery/internal/logtool/logtooltest"
)

// services are the services of `logs`, by folder: their keys are in memory.
var services sync.Map

// logs is a service's logs in the hands of a script:
//
//	logs make DIR N     a stopped service with N leaves in each log
//	logs grow DIR N     start it, add N leaves to each log, stop it
//	logs rotate DIR     give each log a successor with another key
//	logs start DIR      as the running service
//	logs stop DIR
//
// Start may be called on logs that are read-only; grow may not.
func logs(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: logs make|grow|rotate|start|stop DIR [N]")
	}
	dir, n := ts.MkAbs(args[1]), 0
	if len(args) > 2 {
		var err error
		n, err = strconv.Atoi(args[2])
		ts.Check(err)
	}
	if args[0] == "make" {
		s, err := logtooltest.New(dir, n)
		ts.Check(err)
		services.Store(dir, s)
		return
	}
	v, ok := services.Load(dir)
	if !ok {
		ts.Fatalf("logs %s: make it first", dir)
	}
	s := v.(*logtooltest.Service)
	switch args[0] {
	case "grow":
		ts.Check(s.Start())
		for name := range s.Trees {
			ts.Check(s.Fill(name, n))
		}
		ts.Check(s.Stop())
	case "rotate":
		ts.Check(s.Rotate())
	case "start":
		ts.Check(s.Start())
	case "stop":
		ts.Check(s.Stop())
	default:
		ts.Fatalf("logs %s: no such thing", args[0])
	}
}

// TestLineReport: what is not a terminal gets a line now and then, with a rate.
func TestLineReport(t *testing.T) {
	began := time.Unix(1000, 0)
	var b bytes.Buffer
	l := &lineReport{w: &b, task: "ct-ct1", total: 4000, began: began, last: began, every: 5 * time.Second}
	for i := range 16 {
		l.add(250, began.Add(time.Duration(i)*time.Second))
	}
	want := "ct-ct1: 1500 of 4000 leaves, 300/s\nct-ct1: 2750 of 4000 leaves, 275/s\nct-ct1: 4000 of 4000 leaves, 267/s\n"
	if b.String() != want {
		t.Errorf("got %q, want %q", b.String(), want)
	}
}

// TestProgressIsQuietWhenShort: a short task on no terminal prints nothing.
func TestProgressIsQuietWhenShort(t *testing.T) {
	var b strings.Builder
	p := newProgress(&b)
	add, done := p.Begin("ct-ct1", 10)
	add(10)
	done()
	p.close()
	p.close()
	if b.String() != "" {
		t.Errorf("printed %q", b.String())
	}
}
