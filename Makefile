# One target for each thing a developer does. `make demo` and `make test` set everything up themselves.
SHELL := /bin/bash
export PATH := $(or $(CARGO_HOME),$(HOME)/.cargo)/bin:$(PATH)
TARGET := $(or $(CARGO_TARGET_DIR),$(CURDIR)/target)
# The demo and the tests make namespaces, mounts and cgroups: root, by sudo if need be.
SUDO := $(if $(filter 0,$(shell id -u)),,sudo --preserve-env=PATH,HOME,CARGO_HOME,CARGO_TARGET_DIR,RUSTUP_HOME,CI)

.PHONY: help build release demo test lint fmt deny deb bench doc clean setup test-vm fuzz

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | sort

setup: ## install what building needs
	@tests/setup.sh build

build: setup ## the debug binary
	cargo build -p agent

release: setup ## the release binary
	cargo build --release -p agent

demo: release ## run the main job on this machine, in namespaces of its own, until Ctrl-C
	$(SUDO) examples/demo.sh $(TARGET)/release/longshore

test: ## all tests, as root, in namespaces of their own
	@tests/setup.sh test
	cargo build --workspace --all-targets
	$(SUDO) env "PATH=$$PATH" cargo nextest run --workspace --no-fail-fast

test-vm: ## the suite under a real systemd, cgroup v2 and a reboot, in an emulated machine
	@tests/setup.sh test
	cargo build --workspace --all-targets
	$(SUDO) env "PATH=$$PATH" cargo nextest run -p tests --test systemd --run-ignored all

fuzz: ## each fuzz target for a minute
	cargo fuzz --version >/dev/null 2>&1 || cargo install --locked cargo-fuzz
	cd cri-shim && for target in $$(cargo fuzz list); do RUSTC_BOOTSTRAP=1 cargo fuzz run $$target -- -max_total_time=60 || exit 1; done

lint: ## formatting and clippy, as CI runs them
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings

fmt: ## format the code
	cargo fmt --all

deny: ## licences, advisories, duplicate crates
	cargo deny --version >/dev/null 2>&1 || cargo install --locked cargo-deny
	cargo deny check

deb: release ## the Debian package, in dist/
	systemd/deb/build.sh $(TARGET)/release/longshore dist

bench: release ## the figures of the README, in three tables
	cargo build --release -p tests
	$(SUDO) $(TARGET)/release/bench --longshore $(TARGET)/release/longshore
	$(SUDO) $(TARGET)/release/bench-runtime --longshore $(TARGET)/release/longshore
	$(SUDO) $(TARGET)/release/bench-proxy --longshore $(TARGET)/release/longshore

doc: ## API documentation
	cargo doc --workspace --no-deps

clean: ## remove what was built
	cargo clean
	rm -rf dist
