#!/usr/bin/env bash
# The emulator suite with kernels and scheduler instrumented: scripts/sanitize-kernels.sh [address,undefined | thread]
# [arguments of the test binary]. The tests are the same; the sanitizer's runtime is loaded before them.
set -euo pipefail
cd "$(dirname "$0")/.."

kind=${1:-address,undefined}
shift $(($# > 0))
cxx=${CXX:-c++}
case $kind in
  address*) runtime=libasan.so ;;
  thread) runtime=libtsan.so ;;
  *) echo "usage: $0 [address,undefined | thread] [test arguments]" >&2; exit 2 ;;
esac
library=$("$cxx" -print-file-name="$runtime")
[ -e "$library" ] || { echo "error: $cxx has no $runtime" >&2; exit 1; }
preload=$(readlink -f "$library")

target=$(rustc -vV | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_')
export EMULATOR_SANITIZE=$kind
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1
# Rust is not instrumented, so what orders its threads is not known.
export TSAN_OPTIONS=halt_on_error=1:exitcode=66:ignore_noninstrumented_modules=1
# Where the kernel scatters addresses widely (vm.mmap_rnd_bits = 32), runtimes of older compilers find their place taken,
# by chance. So addresses stay where they are, if that is allowed.
fixed="setarch $(uname -m) --addr-no-randomize"
$fixed true 2>/dev/null || fixed=
export "CARGO_TARGET_${target}_RUNNER=$fixed env LD_PRELOAD=$preload"
cargo test --release --test kernels -- "$@"
