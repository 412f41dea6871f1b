#!/bin/sh
# The optimizers' tests of tensor kinds under AddressSanitizer: the C that the engine makes is instrumented, and every tensor of
# the process has guarded memory around it. Reading or writing one element too many ends the run with a report.
#
#     sh bench/sanitized.sh [arguments of pytest]
#
# Needs gcc with its libasan. PYTHON names the interpreter.
set -e
cd "$(dirname "$0")/.."
cache=$(mktemp -d)
trap 'rm -rf "$cache"' EXIT
export XDG_CACHE_HOME="$cache" POLYAK_CFLAGS="-fsanitize=address -g -fno-omit-frame-pointer" CC=gcc CXX=g++
# Leaks are the interpreter's own; libstdc++ comes first, so that C++ exceptions of PyTorch are caught.
export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 OMP_NUM_THREADS=2
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so)" \
    "${PYTHON:-python}" -m pytest -q -p no:cacheprovider "${@:-tests/optim/test_kinds.py}"
