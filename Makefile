# SEDAC: make demo · make test (SLOW=1: all tests) · make lint. Everything lives in .venv and .tools; `make clean` removes both.

PYTHON := .venv/bin/python
export PATH := $(CURDIR)/.venv/bin:$(CURDIR)/.tools/bin:$(PATH)

.PHONY: demo test lint setup clean

demo: setup
	@$(PYTHON) demo.py --out-dir demo_data

test: setup
	cargo test --quiet --manifest-path sedac-core/Cargo.toml
	RUSTFLAGS="--cfg loom" cargo test --quiet --release --manifest-path sedac-core/Cargo.toml --test loom \
		--target-dir sedac-core/target/loom
	$(PYTHON) -m pytest sedac-core/tests $(if $(SLOW),,-m "not slow")

lint: setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	cargo fmt --manifest-path sedac-core/Cargo.toml --check
	cargo clippy --quiet --manifest-path sedac-core/Cargo.toml --all-targets --all-features -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --quiet --manifest-path sedac-core/Cargo.toml --no-deps --all-features

setup:
	@bash setup.sh

clean:
	rm -rf .venv .tools demo_data reports sedac-core/target
