#!/usr/bin/env bash
# Runs every GPU suite of nacre bench and writes ${OUT:-.}/gpu.json; nacre itself need not be
# installed. gpu.sh [--quick] [SUITE ...]: tiny shapes, on the CPU too; some suites only.
# PYTHON=... chooses the interpreter.
set -euo pipefail
mkdir -p "${OUT:-.}"
out=$(cd "${OUT:-.}" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
exec "${PYTHON:-python3}" -m nacre.bench.gpu "$out/gpu.json" "$@"
