# Works as root, or as a user who may sudo. "make help" lists what there is.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := build

VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unreleased)
SUDO    := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
PREFIX  ?= /usr/local
# Static, without paths of this machine: the same source gives the same program.
GO      := CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '-s -w -X main.version=$(VERSION)'

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

.PHONY: build
build: ## the programs, into bin/
	$(GO) -o bin/ ./cmd/muster ./cmd/muster-agent ./cmd/muster-guest
	GOARCH=arm64 $(GO) -o bin/muster-agent-arm64 ./cmd/muster-agent
	GOOS=windows GOARCH=amd64 $(GO) -o bin/muster-agent.exe ./cmd/muster-agent

.PHONY: install
install: ## the programs, into $(PREFIX); as root, after make build
	install -D -t $(DESTDIR)$(PREFIX)/bin bin/muster
	install -D -t $(DESTDIR)$(PREFIX)/lib/muster bin/muster-agent bin/muster-agent-arm64 bin/muster-agent.exe bin/muster-guest

.PHONY: deb
deb: ## the Debian packages, into build/deb
	scripts/deps build
	scripts/deps tools
	$(MAKE) --no-print-directory build
	scripts/deb
	scripts/deb "" muster-appliance

.PHONY: appliance
appliance: ## the appliance: its Debian package, into build/deb, and a disk that boots, into build/appliance
	scripts/deps build box
	scripts/deps tools
	$(MAKE) --no-print-directory build
	$(SUDO) scripts/appliance "$$(scripts/deb "" muster-appliance)"

.PHONY: test-appliance
test-appliance: ## the appliance's disk, by its written guide: from power on to a tested snapshot of a real server
	scripts/deps run build box demo
	scripts/deps tools
	$(MAKE) --no-print-directory build
	$(SUDO) scripts/test-appliance

.PHONY: test-deb
test-deb: build ## the package in a clean Debian with a systemd of its own: install, serve, upgrade, remove, purge
	scripts/deps build test demo
	scripts/deps tools
	$(SUDO) scripts/test-deb

.PHONY: test
test: ## everything that proves it: lint, fast tests, tests with real guests
	scripts/deps run build test demo
	scripts/deps tools
	$(MAKE) --no-print-directory build
	scripts/test lint
	scripts/test fast
	scripts/test race
	scripts/test real
	@echo "make test: everything passed"

.PHONY: test-fast
test-fast: ## the tests that need nothing but Go and PostgreSQL, without the race detector
	scripts/deps build test
	scripts/deps tools
	scripts/test fast

.PHONY: test-real
test-real: build ## the tests with real tools, machines and guests
	scripts/deps run build test demo
	scripts/deps tools
	scripts/test real

.PHONY: lint
lint: ## go vet, golangci-lint, shellcheck
	scripts/deps build test
	scripts/deps tools
	scripts/test lint

.PHONY: bench
bench: build ## the numbers that were promised (JSON=FILE writes them as rows; ONLY=PART,PART measures only those)
	scripts/deps run build demo bench
	scripts/deps tools
	CGO_ENABLED=0 go build -trimpath -buildvcs=false -o bin/ ./cmd/muster-bench
	image=$$($(SUDO) demo/build-shop) && \
	$(SUDO) env MUSTER_DEMO_HOME=/var/lib/muster-bench scripts/sandbox run -- demo/demo with "$$image" bin/muster-bench --image "$$image" \
		--work /var/lib/muster-bench/work --bin bin --dir /var/lib/muster-bench/muster $(if $(ONLY),--only $(ONLY)) $(if $(JSON),--json $(JSON))

.PHONY: orders
orders: ## N (20) snapshots of the demo's shop while customers order: each must boot, pass and hold every confirmed order
	scripts/deps run build demo
	$(MAKE) --no-print-directory build
	$(SUDO) demo/demo orders $(or $(N),20)

.PHONY: demo
demo: ## a real server is protected, tested, burnt down and brought back (KEEP=1 leaves it running)
	scripts/deps run build demo
	$(MAKE) --no-print-directory build
	$(SUDO) env KEEP=$(KEEP) demo/demo

.PHONY: demo-stop
demo-stop: ## end and remove what make demo KEEP=1 left running
	$(SUDO) demo/demo stop

.PHONY: generate
generate: ## what go generate makes
	scripts/deps build generate
	go generate ./...

.PHONY: clean
clean: ## remove what was built; the packages of the shop's Debian and the Go tools stay in build/
	$(SUDO) rm -rf bin build/test build/demo/shop-*.img
