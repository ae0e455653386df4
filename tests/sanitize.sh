#!/usr/bin/env bash
# The native kernels under the address and undefined-behaviour sanitizers: builds an instrumented extension in a copy of
# the sources and runs the tests of the kernels on it. Needs gcc (or CXX=clang++) and an environment with the dev extra:
# make sanitize, or PYTHON=.venv/bin/python tests/sanitize.sh
set -euo pipefail
cd "$(dirname "$0")/.."
command -v "${CXX:-c++}" >/dev/null || { echo "no C++ compiler: no kernels to check"; exit; }
python=$(command -v "${PYTHON:-python}")
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")  # absolute, but not what a link in an environment leads to
export PATH="$(dirname "$python"):$PATH"  # its cmake and ninja
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cp -r src tests pyproject.toml "$work"
rm -f "$work"/src/subbit/runtime/_native*.so
cmake -S . -B "$work/build" -DSUBBIT_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo \
    -DPython_EXECUTABLE="$python" -Dnanobind_DIR="$("$python" -m nanobind --cmake_dir)"
cmake --build "$work/build" --parallel
cp "$work"/build/_native*.so "$work/src/subbit/runtime/"

# The interpreter is not instrumented, so the runtime has to be loaded before it, and with it the C++ library, whose
# exceptions it looks into; what the interpreter never frees is not ours.
runtime=$("${CXX:-c++}" -print-file-name=libasan.so)
[ -e "$runtime" ] || runtime=$("${CXX:-c++}" -print-file-name=libclang_rt.asan-$(uname -m).so)
cd "$work"
# -S keeps an editable installation from taking the place of the copy.
site=$("$python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
preload="$runtime $("${CXX:-c++}" -print-file-name=libstdc++.so.6)"
LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH="$work/src:$site" \
    SUBBIT_NATIVE=1 "$python" -S -m pytest -q -s -p no:cacheprovider tests/test_native.py tests/test_native_grouped.py \
    -k "not compile" "$@"
