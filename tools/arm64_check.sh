#!/usr/bin/env bash
# Shows on emulated CPUs that a 64-bit ARM machine computes the same bits.
#
#     tools/arm64_check.sh                  the essential part
#     tools/arm64_check.sh all [CPU...]     the whole test suite, on these CPUs or on all three
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

step() {
    printf '\n==> %s\n' "$*"
    "$@"
}

# What arm64 must show: every kernel equals the scalar one, the goldens hold, whole models give the stored bits, and the
# command writes the same text. The emulated CPUs have dotprod and i8mm, only dotprod, or neither; the kernels that the last
# two lack the first has tested, so there the ones they choose are enough.
target=aarch64-unknown-linux-gnu
arm64_cargo() { step tools/arm64.sh cargo "$1" --locked --target "$target" "${@:2}"; }

if [ "${1:-}" = all ]; then
    shift
    [ $# -gt 0 ] || set -- max neoverse-n1 cortex-a53
    for ARM64_CPU in "$@"; do
        export ARM64_CPU
        printf '\n==> %s\n' "$ARM64_CPU"
        arm64_cargo test --workspace --no-fail-fast
    done
    exit
fi

say() { "$@" run -p "Once upon a time" -n 60 --temp 0; }

export ARM64_CPU=max
arm64_cargo test -p bitnet-kernels
arm64_cargo test -p bitnet --test goldens --test stored_bits
arm64_cargo build -p bitnet-cli
for ARM64_CPU in neoverse-n1 cortex-a53; do
    arm64_cargo test -p bitnet-kernels --test one_result
    arm64_cargo test -p bitnet --test stored_bits the_best_kernels
done
expected=$(say cargo run -q --locked -p bitnet-cli -- 2>/dev/null)
for pair in max:neoni8mm neoverse-n1:neondotprod cortex-a53:neon; do
    ARM64_CPU=${pair%:*}
    printf '\n==> bitnet run on %s\n' "$ARM64_CPU"
    notes=$(mktemp)
    text=$(say tools/arm64.sh cargo run -q --locked --target "$target" -p bitnet-cli -- 2>"$notes")
    cat "$notes"
    if [ "$text" != "$expected" ] || ! grep -q ", ${pair#*:}, " "$notes"; then
        printf 'wanted %s and the text\n%s\nbut it wrote\n%s\n' "${pair#*:}" "$expected" "$text" >&2
        exit 1
    fi
done
