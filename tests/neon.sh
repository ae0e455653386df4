#!/usr/bin/env bash
# The kernels for NEON where there is no ARM processor: builds tests/kernels.cpp with a cross compiler, once as it is and once
# with the sanitizers, and runs it in an emulator. Needs Debian's g++-aarch64-linux-gnu and qemu-user; takes a minute. On an
# ARM machine tests/test_native.py does this and more.
set -euo pipefail
cd "$(dirname "$0")/.."
emulator=$(command -v qemu-aarch64 qemu-aarch64-static | head -1)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

sources=src/subbit/runtime/cpu
for flags in "" "-fsanitize=address,undefined -fno-sanitize-recover=undefined"; do
    aarch64-linux-gnu-g++ -std=c++17 -O2 -Wall -Wextra -DSUBBIT_NEON -I$sources $flags -pthread -o "$work/neon" \
        tests/kernels.cpp $sources/{codes,grouped,neon,portable,rows,team}.cpp
    ASAN_OPTIONS=detect_leaks=0 "$emulator" -L /usr/aarch64-linux-gnu "$work/neon"
done
