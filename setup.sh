#!/usr/bin/env bash
# Everything SEDAC needs, below this folder: uv and, where it is missing, Rust in .tools, the rest in .venv.
# Can be run again at any time; with nothing to do it takes well under a second. `make` runs it.
set -euo pipefail
cd "$(dirname "$0")"
export PATH="$PWD/.tools/bin:$PATH"

say() { echo "setup: $*" >&2; }
die() { say "$*"; exit 1; }

# Which set-up: the CUDA build of vLLM beside an NVIDIA GPU, vLLM's CPU build elsewhere on Linux x86-64.
if [ "$(uname -sm)" != "Linux x86_64" ]; then
  die "only Linux x86-64 is tested. Elsewhere steps 1-3 and 8 work without vLLM: pip install torch transformers" \
    "accelerate datasets gguf matplotlib scipy tqdm safetensors prometheus-client ./sedac-core (needs Rust)"
fi
requirements=requirements-cpu.txt overrides=(--override overrides-cpu.txt)
if command -v nvidia-smi > /dev/null && nvidia-smi -L 2> /dev/null | grep -q GPU; then
  requirements=requirements.txt overrides=()
fi

# Nothing to do? The stamp is the hash of all that is installed from.
stamp=.venv/sedac-setup.sha256
inputs=$(cat "$requirements" requirements-dev.txt overrides-cpu.txt setup.sh &&
  find sedac-core/Cargo.toml sedac-core/Cargo.lock sedac-core/pyproject.toml sedac-core/src sedac-core/python \
    -type f ! -name '*.so' ! -path '*__pycache__*' -print0 | sort -z | xargs -0 cat)
hash=$(sha256sum <<< "$inputs" | cut -d' ' -f1)

# Rust: the one on PATH. With another HOME, rustup's proxy has to be told where its toolchain lies.
if ! cargo --version > /dev/null 2>&1; then
  home=$(dirname "$(dirname "$(dirname "$(command -v cargo || echo /nowhere/at/all)")")")
  toolchain=$(ls -d "$home"/.rustup/toolchains/*/bin 2> /dev/null | head -n 1 || true)
  mkdir -p .tools/bin
  if [ -n "$toolchain" ]; then
    ln -sf "$toolchain"/* .tools/bin/
  else
    say "installing Rust into .tools"
    curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs |
      RUSTUP_HOME="$PWD/.tools/rustup" CARGO_HOME="$PWD/.tools/cargo" sh -s -- -y -q --no-modify-path --profile default ||
      die "Rust could not be installed: install it from https://rustup.rs and run make again"
    ln -sf "$PWD"/.tools/rustup/toolchains/*/bin/* .tools/bin/
  fi
  hash -r  # forget where cargo was
  cargo --version > /dev/null || die "cargo does not run: install Rust from https://rustup.rs and run make again"
fi
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$hash" ] && exit 0

if ! command -v uv > /dev/null; then
  say "installing uv into .tools"
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null ||
    die "Python 3.11 or newer is needed as python3: install it, or uv (https://docs.astral.sh/uv), and run make again"
  python3 -m venv .tools/uv || die "python3 has no working venv module: install it (Debian: apt install python3-venv)"
  .tools/uv/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.8,<1'
  mkdir -p .tools/bin && ln -sf "$PWD/.tools/uv/bin/uv" .tools/bin/uv
fi
python=.venv/bin/python
[ -x "$python" ] || uv venv --quiet --seed --python '>=3.11,<3.14' .venv
# A patched vLLM stays patched over an update of SEDAC alone, so take the patch out with the version that put it in.
if [ -f "$stamp" ]; then
  "$python" patch_vllm_surgical.py --revert > /dev/null || say "the patch in vLLM could not be reverted: see --check"
fi
say "installing $requirements into .venv (downloads up to 6 GB the first time)"
uv pip install --quiet --python "$python" -r "$requirements" -r requirements-dev.txt "${overrides[@]}" \
  --reinstall-package sedac-core
"$python" -m compileall -qq -j 0 .venv/lib || true  # vLLM's first import takes a minute less
echo "$hash" > "$stamp"
say "ready"
