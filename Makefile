# Every target does its own set-up. `make demo` and `make test` are the two to
# know; README.md says what they show.

GO          ?= go
BIN         := bin
COSIGN_V    := v3.1.3
COSIGN      := $(BIN)/cosign-$(COSIGN_V)
COSIGN2_V   := v2.6.5
COSIGN2     := $(BIN)/cosign-$(COSIGN2_V)
SIGSTORE_PY_V := 4.5.1
SIGSTORE_PY := $(BIN)/sigstore-python-$(SIGSTORE_PY_V)/bin/sigstore
SIGSTORE_JS := $(BIN)/sigstore-js/node_modules
SIGSTORE_JAVA := $(BIN)/sigstore-java
LINT_V      := v2.15.0
LINT        := $(BIN)/golangci-lint-$(LINT_V)
FULCIO_V    := v1.8.8
CTGO_V      := v1.4.0
TRILLIAN_V  := v1.8.0
PEER        := $(BIN)/peer-fulcio-$(FULCIO_V)-ctfe-$(CTGO_V)-trillian-$(TRILLIAN_V)
PEERTIME    ?= 10
BENCHTIME   ?= 3s
FUZZTIME    ?= 60s
FUZZ        ?=
GROWTH      ?= 10000000
REQUESTS    ?= 1000000
POINTS      ?= 2000

# Debian packages, each with a command or file that shows it is there.
PACKAGES := softhsm2 swtpm swtpm-tools tpm2-tools python3-tpm2-pytss libtpm2-pkcs11-1 libtpm2-pkcs11-tools libnss3 libnss3-tools p11-kit openssl openssh-client strace gcc libc6-dev git systemd systemd-container python3 python3-venv curl jose
SUDO     := $(if $(filter 0,$(shell id -u)),,sudo)

.DEFAULT_GOAL := help
.PHONY: help build deps demo test test-clients lint bench bench-peer bench-growth test-fulcio test-flat torture torture-hsm fuzz clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

deps: ## install the Debian packages that are missing
	@missing=""; for p in $(PACKAGES); do \
	  dpkg-query -W -f='$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || missing="$$missing $$p"; done; \
	if [ -n "$$missing" ]; then echo "installing:$$missing"; \
	  $(SUDO) apt-get -o Acquire::Retries=3 update -qq && DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get -o Acquire::Retries=3 install -y -qq --no-install-recommends $$missing >/dev/null; fi
	@command -v $(GO) >/dev/null || { echo "make: Go 1.26 is needed (https://go.dev/dl)"; exit 1; }

build: deps ## build both programs into bin/
	$(GO) build -trimpath -o $(BIN)/ ./cmd/chancery ./cmd/chancery-ceremony

demo: build ## set up everything in ./chancery-demo, sign a file and verify it
	$(BIN)/chancery demo --once --dir chancery-demo

test: deps ## run every test, with the race detector, on real SoftHSM and swtpm
	CHANCERY_REQUIRE_HSM=1 $(GO) test -race -timeout 15m ./...

$(COSIGN):
	GOBIN=$(abspath $(BIN)/tmp) $(GO) install github.com/sigstore/cosign/v3/cmd/cosign@$(COSIGN_V)
	mv $(BIN)/tmp/cosign $@

$(COSIGN2):
	GOBIN=$(abspath $(BIN)/tmp) $(GO) install github.com/sigstore/cosign/v2/cmd/cosign@$(COSIGN2_V)
	mv $(BIN)/tmp/cosign $@

$(SIGSTORE_PY):
	python3 -m venv $(BIN)/sigstore-python-$(SIGSTORE_PY_V)
	$(BIN)/sigstore-python-$(SIGSTORE_PY_V)/bin/pip install -q sigstore==$(SIGSTORE_PY_V)

$(SIGSTORE_JS):
	npm install --silent --no-audit --no-fund --prefix $(BIN)/sigstore-js \
	  @sigstore/sign@5.1.0 @sigstore/verify@4.1.3 @sigstore/bundle@5 @sigstore/protobuf-specs@0.5

$(SIGSTORE_JAVA): test/testdata/sigstore-java/pom.xml
	rm -rf $@
	mvn -q -B -f $< dependency:copy-dependencies -DoutputDirectory=$(abspath $(BIN))/tmp-java
	mv $(BIN)/tmp-java $@

test-clients: deps $(COSIGN) $(COSIGN2) $(SIGSTORE_PY) $(if $(shell command -v npm),$(SIGSTORE_JS)) $(if $(shell command -v mvn),$(SIGSTORE_JAVA)) ## sign and verify with unmodified cosign, sigstore-python, -js and -java
	CHANCERY_REQUIRE_HSM=1 CHANCERY_COSIGN=$(abspath $(COSIGN)) CHANCERY_COSIGN2=$(abspath $(COSIGN2)) CHANCERY_SIGSTORE_PYTHON=$(abspath $(SIGSTORE_PY)) \
	  CHANCERY_SIGSTORE_JS=$(if $(shell command -v npm),$(abspath $(SIGSTORE_JS))) \
	  CHANCERY_SIGSTORE_JAVA=$(if $(shell command -v mvn),$(abspath $(SIGSTORE_JAVA))) \
	  $(GO) test -count=1 -timeout 15m -run 'TestCosign|TestCeremonyTUF|TestPython|TestJava' -v ./test

$(LINT):
	GOBIN=$(abspath $(BIN)/tmp) $(GO) install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(LINT_V)
	mv $(BIN)/tmp/golangci-lint $@

lint: deps $(LINT) ## vet and lint
	$(GO) vet ./...
	$(LINT) run ./...

bench: deps ## measure the whole path and its parts; prints ratios within one run
	CHANCERY_REQUIRE_HSM=1 $(GO) test -run '^$$' -bench . -benchtime $(BENCHTIME) -timeout 60m ./test ./hsm/... ./log/... ./test/growth

$(PEER):
	rm -rf $(BIN)/tmp-peer
	GOBIN=$(abspath $(BIN)/tmp-peer) CGO_ENABLED=1 $(GO) install github.com/sigstore/fulcio@$(FULCIO_V)
	GOBIN=$(abspath $(BIN)/tmp-peer) $(GO) install github.com/google/certificate-transparency-go/trillian/ctfe/ct_server@$(CTGO_V)
	GOBIN=$(abspath $(BIN)/tmp-peer) $(GO) install $(foreach p,log_server log_signer,github.com/google/trillian/cmd/trillian_$(p)@$(TRILLIAN_V)) github.com/google/trillian/cmd/createtree@$(TRILLIAN_V)
	mv $(BIN)/tmp-peer $@

bench-peer: deps $(PEER) ## measure beside Fulcio, CTFE and Trillian, in turns of PEERTIME seconds; prints ratios
	@$(MAKE) --no-print-directory deps PACKAGES=postgresql
	CHANCERY_REQUIRE_HSM=1 CHANCERY_PEER=$(abspath $(PEER)) CHANCERY_PEER_SECONDS=$(PEERTIME) \
	  $(GO) test -count=1 -run '^TestPeer$$' -timeout 1h -v ./test

test-fulcio: deps $(PEER) ## ask Fulcio's program and ours the same and compare every answer
	CHANCERY_PEER=$(abspath $(PEER)) $(GO) test -count=1 -run '^TestLikeFulcioServer$$' -v ./ca/server

test-flat: deps ## send REQUESTS requests (needs 4 GB in TMPDIR) and want memory as it was after 1,000
	CHANCERY_REQUIRE_HSM=1 CHANCERY_FLAT_REQUESTS=$(REQUESTS) $(GO) test -count=1 -run '^TestFlatMemory$$' -timeout 4h -v ./cmd/chancery/internal/demo

bench-growth: deps ## grow a log to GROWTH leaves of 1 KiB; prints what a leaf costs
	GOMEMLIMIT=80MiB CHANCERY_GROWTH_LEAVES=$(GROWTH) $(GO) test -count=1 -run '^TestGrowth$$' -timeout 4h -v ./test/growth

torture: deps ## kill the log, fail its calls and cut its power, at POINTS points
	CHANCERY_TORTURE_POINTS=$(POINTS) $(GO) test -count=1 -timeout 4h -v ./test/torture
	CHANCERY_TORTURE_ROUNDS=$$(($(POINTS) / 100)) $(GO) test -count=1 -timeout 1h -run 'Kill|SyscallFaults' -v ./log/store

torture-hsm: deps ## fail every call to the token while keys sign, and take it away; prints what came of it
	CHANCERY_REQUIRE_HSM=1 CHANCERY_TORTURE_HSM=1 $(GO) test -race -count=1 -timeout 20m -v ./test/hsmtorture
	CHANCERY_REQUIRE_HSM=1 CHANCERY_TORTURE_HSM=1 $(GO) test -race -count=1 -run TestAttestation ./hsm/tpm

fuzz: deps ## run every fuzz target (of the folders FUZZ) for FUZZTIME, 60s or 3000x
	test/fuzz.sh $(FUZZTIME) $(BIN)/fuzz $(FUZZ)

clean: ## remove what was built
	rm -rf $(BIN)
