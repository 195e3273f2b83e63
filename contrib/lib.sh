# What the scripts beside this share; sourced, not run.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '\n== %s\n' "$*"; }
die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }

# need PROGRAM PACKAGE ...: installs what is missing where that can be done without a question,
# else names it. /sbin is where e2fsprogs lives, and not in every user's PATH.
need() {
    PATH=$PATH:/usr/sbin:/sbin
    local missing=()
    while (($#)); do
        command -v "$1" >/dev/null || missing+=("$2")
        shift 2
    done
    ((${#missing[@]})) || return 0
    mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
    if ((EUID == 0)) && command -v apt-get >/dev/null; then
        say "installing ${missing[*]}"
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -qq && apt-get install -qq -y --no-install-recommends "${missing[@]}" && return 0
    fi
    die "missing: ${missing[*]} (Debian, Ubuntu: sudo apt-get install ${missing[*]})"
}

need_rust() {
    command -v cargo >/dev/null || [[ ! -f $HOME/.cargo/env ]] || . "$HOME/.cargo/env"
    command -v cargo >/dev/null || die "missing: Rust, 1.86 or newer (https://rustup.rs)"
    command -v cc >/dev/null || need cc gcc
}

# target_dir: where cargo builds.
target_dir() {
    printf '%s\n' "${CARGO_TARGET_DIR:-$here/target}"
}

is_mounted() { grep -qsF " $1 " /proc/self/mountinfo; }

# wait_gone PID: until the process has ended, 60 seconds at most.
wait_gone() {
    local _
    for _ in {1..600}; do
        [[ -d /proc/$1 ]] || return 0
        # Ours and ended, but not yet waited for.
        [[ $(sed 's/.*) //;s/ .*//' "/proc/$1/stat" 2>/dev/null || echo Z) == Z ]] && return 0
        sleep 0.1
    done
    return 1
}
