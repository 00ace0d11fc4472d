# The two commands of the README, and what they are made of. Needs root, apt and Rust.

CARGO ?= cargo
# How long `make fuzz` takes for each of its targets. What it finds is in fuzz/artifacts.
FUZZ_SECONDS ?= 60
FUZZ_TARGETS = frames join_token qmp store_files

# Guests have no libraries: what runs in them is linked statically, for which cargo wants a triple.
HOST_TRIPLE = $(shell rustc -vV | sed -n 's/^host: //p')
GUEST_PROGRAMS = RUSTFLAGS="-C target-feature=+crt-static" \
  $(CARGO) build --release --locked -p appmembench --target $(HOST_TRIPLE)


.PHONY: all deps build test lint unit demo chaos migrate-soak bench bench-migrate sim fuzz clean help

all: build

help: ## Show the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

deps: ## Install what the demo and the tests need (QEMU, a guest kernel, busybox, mbw, iproute2); unpack QEMU 10
	scripts/install-deps.sh

build: ## Build the programs
	$(CARGO) build --release --locked -p heca -p heca-lab
	$(GUEST_PROGRAMS)

lint: ## Formatting, lints, rules of the tree
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	scripts/check-tree.sh

unit: deps ## All tests
	$(CARGO) build --locked --workspace --bins
	$(GUEST_PROGRAMS)
	$(CARGO) test --locked --workspace --no-fail-fast

test: deps lint unit ## Install, build, lint and run all tests

demo: deps build ## Three hosts, a guest on pooled memory, a memory test in it
	target/release/heca-demo

chaos: deps build ## Faults of every kind under a guest that verifies its memory, for nine minutes
	target/release/heca-chaos

migrate-soak: deps build ## A guest that goes back and forth 200 times, with a fault in every fourth move
	target/release/heca-migrate-soak

bench: deps build ## Latency of remote faults beside its floors
	target/release/heca bench fault

bench-migrate: deps build ## How long a guest stands still when it is moved, beside QEMU's own ways (8 minutes)
	target/release/heca bench migrate --quick

sim: build ## The state machines in a simulated world: every scenario, 2000 seeds each
	target/release/heca sim --scenario all --seeds 1..2000

fuzz: ## Fuzz every decoder, FUZZ_SECONDS each (needs nightly Rust and cargo-fuzz)
	@cd fuzz && for target in $(FUZZ_TARGETS); do \
	  mkdir -p "target/corpus/$$target" && \
	  $(CARGO) +nightly fuzz run "$$target" "target/corpus/$$target" "corpus/$$target" -- \
	    -max_total_time=$(FUZZ_SECONDS) || exit 1; \
	done

clean:
	$(CARGO) clean
