#!/usr/bin/env bash
# The kernel for AMX on processors that have AVX-512 VBMI and VNNI but no matrix registers: builds tests/kernels.cpp with the
# registers of tests/amx_registers.hpp, once as it is and once with the sanitizers. Needs gcc (or CXX=clang++); takes a
# minute. Where there are such registers tests/test_native.py does this and more.
set -euo pipefail
cd "$(dirname "$0")/.."
for feature in avx512vbmi avx512_vnni; do
    grep -qw $feature /proc/cpuinfo || { echo "no $feature here: not run"; exit; }
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

sources=src/subbit/runtime/cpu
isa="-mavx2 -mfma -mavx512f -mavx512vl -mavx512dq -mavx512bw -mavx512vbmi -mavx512vnni"
for flags in "" "-fsanitize=address,undefined -fno-sanitize-recover=undefined"; do
    "${CXX:-c++}" -std=c++17 -O2 $isa -DSUBBIT_AVX2 -DSUBBIT_AVX512 -DSUBBIT_AMX -I$sources $flags \
        -include tests/amx_registers.hpp -pthread -o "$work/amx" \
        tests/kernels.cpp $sources/{codes,grouped,avx2,avx512,amx,portable,rows,team}.cpp
    ASAN_OPTIONS=detect_leaks=0 "$work/amx"
done
