#!/usr/bin/env bash
# Runs a command with everything that building and testing for 64-bit ARM needs on an x86-64 Debian machine: a Rust standard
# library for aarch64, a cross linker, and qemu's user-mode emulator as the runner of what is built.
#
#     tools/arm64.sh cargo test --target aarch64-unknown-linux-gnu
#     ARM64_CPU=cortex-a53 tools/arm64.sh cargo test --target aarch64-unknown-linux-gnu -p bitnet-kernels
#
# ARM64_CPU is the CPU to emulate: max (the default) has the dotprod and i8mm extensions, neoverse-n1 only dotprod, cortex-a53
# neither. ARM64_HOME is where the toolchain is kept, target/arm64-toolchain if not set; it is made on the first call (some
# 250 MB to download). ARM64_SOURCES=1 adds the sources of the standard library, for targets whose library has to be built.
#
# The linker and the C library for ARM are installed as packages, which needs root unless they are there already; all
# else is unpacked into ARM64_HOME and changes nothing on the system. Whatever fails ends the script with an error.
set -euo pipefail

target=aarch64-unknown-linux-gnu
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
home=$(realpath -m "${ARM64_HOME:-$root/target/arm64-toolchain}")
host_libs=usr/lib/x86_64-linux-gnu

fail() {
    echo "tools/arm64.sh: $*" >&2
    exit 1
}

# apt with a state of its own that knows both architectures, so that the system's package lists stay as they are.
private_apt() {
    mkdir -p "$home"/apt/lists/partial "$home"/apt/cache/archives/partial
    cat >"$home/apt/conf" <<CONF
APT::Architecture "amd64";
APT::Architectures { "amd64"; "arm64"; };
APT::Sandbox::User "root";
Dir::State "$home/apt";
Dir::State::status "/var/lib/dpkg/status";
Dir::Cache "$home/apt/cache";
CONF
    APT_CONFIG=$home/apt/conf apt-get -qq update
}

# unpack PACKAGE...: downloads the packages and unpacks them under $home.
unpack() {
    local dir=$home/packages package
    rm -rf "$dir" && mkdir -p "$dir"
    (cd "$dir" && APT_CONFIG=$home/apt/conf apt-get -qq download "$@") || fail "cannot download $*"
    for package in "$dir"/*.deb; do
        dpkg -x "$package" "$home"
    done
    rm -rf "$dir"
    find "$home/usr/bin" -name 'qemu-*-static' ! -name qemu-aarch64-static -delete
}

install_linker() {
    dpkg -s gcc-aarch64-linux-gnu libc6-dev-arm64-cross >/dev/null 2>&1 && return
    [ "$(id -u)" = 0 ] || fail "install gcc-aarch64-linux-gnu and libc6-dev-arm64-cross first"
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq update
    apt-get -yqq install --no-install-recommends gcc-aarch64-linux-gnu libc6-dev-arm64-cross >&2
}

# Debian's compiler matches its standard library for ARM; the one in use may have none. It is found under the name of its
# package for web browsers, which follows new versions of Rust.
install_compiler() {
    local version release llvm tool
    version=$(APT_CONFIG=$home/apt/conf apt-cache policy rustc-web | awk '/Candidate:/ { print $2 }')
    [ -n "$version" ] && [ "$version" != "(none)" ] || fail "these package sources have no rustc-web"
    release=$(cut -d. -f1,2 <<<"$version")
    llvm=$(APT_CONFIG=$home/apt/conf apt-cache depends "libstd-rust-web-$release" |
        awk '$1 == "Depends:" && $2 ~ /^libllvm/ { print $2 }')
    unpack rustc-web "libstd-rust-web-$release:amd64" "${llvm:?}:amd64" libstd-rust-web-dev:amd64 libstd-rust-web-dev:arm64
    for tool in rustc rustdoc; do
        cat >"$home/$tool" <<TOOL
#!/bin/sh
LD_LIBRARY_PATH='$home/$host_libs'\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH} exec '$home/usr/bin/$tool' "\$@"
TOOL
        chmod +x "$home/$tool"
    done
}

[ "$(uname -s) $(uname -m)" = "Linux x86_64" ] || fail "this is for x86-64 Linux; on an ARM machine use cargo as it is"
command -v apt-get >/dev/null || fail "this needs Debian's packages"
install_linker
rustc_libs=$(rustc --print target-libdir --target "$target" 2>/dev/null || true)
if [ ! -e "$home/complete" ]; then
    rm -rf "$home" && mkdir -p "$home"
    private_apt
    unpack qemu-user-static:amd64
    if [ ! -d "$rustc_libs" ]; then
        install_compiler
    fi
    rm -rf "$home/apt"
    touch "$home/complete"
fi
if [ -n "${ARM64_SOURCES:-}" ] && [ ! -e "$home/complete-sources" ]; then
    private_apt
    unpack rust-web-src
    rm -rf "$home/apt"
    touch "$home/complete-sources"
fi

if [ -x "$home/rustc" ]; then
    # What another compiler builds is kept apart, or each would rebuild the other's.
    export RUSTC=$home/rustc RUSTDOC=$home/rustdoc
    export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$root/target}/arm64
fi
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="$home/usr/bin/qemu-aarch64-static -L /usr/aarch64-linux-gnu -cpu ${ARM64_CPU:-max}"
[ $# -gt 0 ] || fail "which command?"
exec "$@"
