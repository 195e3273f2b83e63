# The table at the end of contrib/xfstests; sourced.

# summary WORK EXCLUDES TEST ...: what became of each test.
summary() {
    local work=$1 excludes=$2 name result
    shift 2
    local passed=0 failed=() excluded=0 missing=()
    : >"$work/notrun"
    for name in "$@"; do
        result=$work/results/$name
        if [[ $excludes ]] && grep -qxF "$name" "$excludes"; then
            excluded=$((excluded + 1))
        elif [[ -e $result.notrun ]]; then
            printf '%s\t%s\n' "$name" "$(head -n 1 "$result.notrun")" >>"$work/notrun"
        elif grep -q "^Failures:.* $name\( \|$\)" "$work/check.log" ||
            grep -qsw "$name" "$work/killed"; then
            failed+=("$name")
        elif grep -q "^$name .*[0-9]s\$" "$work/check.log"; then
            passed=$((passed + 1))
        else
            missing+=("$name")
        fi
    done
    # Reasons that differ only in names and numbers are one.
    say "not run, by reason"
    cut -f 2 "$work/notrun" | sed 's/[0-9]\+/N/g; s|/[^ ]*/|/|g' | sort | uniq -c | sort -rn
    if ((${#failed[@]})); then
        say "failed"
        printf '%s\n' "${failed[@]}"
    fi
    if ((${#missing[@]})); then
        say "without a result"
        printf '%s\n' "${missing[@]}"
    fi
    printf '\n%-12s %5d\n' passed "$passed" failed "${#failed[@]}" 'not run' \
        "$(wc -l <"$work/notrun")" excluded "$excluded" 'no result' "${#missing[@]}"
}
