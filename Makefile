# Deputy's tasks. `make` prints them.

SHELL      := /bin/bash
BIN        := bin
VERSION    ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS    := -s -w -X main.version=$(VERSION)
GO         ?= go
export CGO_ENABLED ?= 0

.DEFAULT_GOAL := help
.PHONY: help build demo test race fuzz peers bench lint proto tidy clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## Build the static binaries into bin/
	$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/...

proto: ## Generate the Go code of proto/ (needs protoc: apt-get install protobuf-compiler)
	mkdir -p $(BIN)
	cd tools && $(GO) build -o ../$(BIN)/tools/ google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc
	PATH="$(CURDIR)/$(BIN)/tools:$$PATH" protoc -I proto \
		-I "$$($(GO) list -m -f '{{.Dir}}' github.com/spiffe/spire-api-sdk)/proto" \
		--go_out=proto --go_opt=paths=source_relative \
		--go-grpc_out=proto --go-grpc_opt=paths=source_relative \
		$$(cd proto && find * -name '*.proto' | sort)
