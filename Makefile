# Deputy's tasks. `make` prints them.

SHELL   := /bin/bash
GO      ?= go
BIN     := bin
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X main.version=$(VERSION)
STATIC  := CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)'
FUZZ    ?= 20s

# Where the peers' tests, too, keep what they build.
SPIRE         := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/deputy-peers
SPIRE_VERSION := $(shell awk '$$1 == "github.com/spiffe/spire" { print substr($$2, 2) }' test/peers/spire/go.mod)

.DEFAULT_GOAL := help
.PHONY: help build demo test prerequisites test-clients lint race peers fuzz bench bench-peers proto clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## Build the static binaries into bin/
	$(STATIC) -o $(BIN)/ ./cmd/...

demo: build ## Show the main job with real processes and a container, in under a minute
	$(STATIC) -o $(BIN)/ ./test/agent ./test/demo
	$(BIN)/demo

test: prerequisites lint race peers ## Run every test; installs what they need
	@echo "== all of it passed"

prerequisites:
	@echo "== what the tests need: a C compiler for the race detector, Docker, a registry, systemd, nginx, HAProxy, PostgreSQL"
	@test/prerequisites

lint: ## Check formatting, vet and static analysis
	@echo "== gofmt, vet, staticcheck"
	@out=$$(gofmt -l $$(git ls-files --cached --others --exclude-standard '*.go')); if [ -n "$$out" ]; then echo "not gofmt'ed:"; echo "$$out"; exit 1; fi
	$(GO) vet ./...
	cd tools && CGO_ENABLED=0 $(GO) build -o ../$(BIN)/tools/ honnef.co/go/tools/cmd/staticcheck
	$(BIN)/tools/staticcheck ./...

race: build
	@echo "== unit, script and integration tests, fuzz seeds, race detector (the first build takes some minutes)"
	GORACE=atexit_sleep_ms=0 CGO_ENABLED=1 $(GO) test -race -timeout 20m ./...

peers: build
	@echo "== stock third parties (the first builds of SPIRE and Vault take some minutes each, that of Kubernetes ten and more)"
	cd test/peers && $(GO) vet ./... && $(GO) test -count=1 -timeout 75m ./...

test-clients: build ## Run clients in Python, Java and Rust (needs rustc 1.88; installs the rest)
	@echo "== clients of other languages (the first build takes some minutes)"
	@test/prerequisites clients
	cd test/clients && $(GO) vet ./... && $(GO) test -count=1 -timeout 20m ./...

fuzz: ## Fuzz each parser for FUZZ (20s)
	@for p in $$($(GO) list ./...); do \
		for f in $$($(GO) test -list '^Fuzz' $$p | grep '^Fuzz'); do \
			echo "== $$p $$f"; $(GO) test -run '^$$' -fuzz "^$$f$$" -fuzztime $(FUZZ) $$p || exit 1; \
		done; \
	done

bench: build ## Measure beside a bare gRPC server: Go benchmarks, then a client's view
	$(GO) test -run '^$$' -bench . -benchmem ./...
	$(STATIC) -o $(BIN)/ ./test/bench
	$(BIN)/bench

bench-peers: $(SPIRE)/spire-server-$(SPIRE_VERSION) $(SPIRE)/spire-agent-$(SPIRE_VERSION) bench ## The same beside SPIRE's agent, and what deputy-claims adds to SPIRE's minting
	cd test/peers && $(GO) test -run '^$$' -bench . -benchtime 2000x ./...

# The server's SQLite needs C. The tests of test/peers use the same files.
$(SPIRE)/spire-%-$(SPIRE_VERSION):
	cd test/peers/spire && CGO_ENABLED=1 $(GO) build -o $@ github.com/spiffe/spire/cmd/spire-$*

proto: ## Generate the Go code of proto/ (needs protoc: apt-get install protobuf-compiler)
	cd tools && CGO_ENABLED=0 $(GO) build -o ../$(BIN)/tools/ google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc
	PATH="$(CURDIR)/$(BIN)/tools:$$PATH" protoc -I proto \
		-I "$$($(GO) list -m -f '{{.Dir}}' github.com/spiffe/spire-api-sdk)/proto" \
		--go_out=proto --go_opt=paths=source_relative \
		--go-grpc_out=proto --go-grpc_opt=paths=source_relative \
		$$(cd proto && find * -name '*.proto' | sort)

clean: ## Remove what was built
	rm -rf $(BIN)
