#!/usr/bin/env bash
# SPECIFICATION.md names tests and invariants: they must exist, and every invariant must be named.
set -euo pipefail
cd "$(dirname "$0")/.."
spec=SPECIFICATION.md
invariants=crates/heca-core/src/invariants.rs
failed=0
complain() {
  echo "check-spec: $1" >&2
  failed=1
}

# Every test that is named is a test in the file that is named, and is not ignored.
while IFS= read -r reference; do
  file=${reference%%::*}
  name=${reference##*::}
  if [ ! -f "$file" ]; then
    complain "$reference: there is no such file"
  elif ! grep -qE "^ *(async )?fn $name\(" "$file"; then
    complain "$reference: there is no such function"
  elif ! grep -B 6 -E "^ *(async )?fn $name\(" "$file" |
    awk '/^ *}/ { test = ignored = 0 } /#\[(tokio::)?test/ { test = 1; ignored = 0 } /#\[ignore/ { ignored = 1 }
         END { exit !(test && !ignored) }'; then
    complain "$reference: the function is no test, or an ignored one"
  fi
done < <(grep -oE '`[A-Za-z0-9_./-]+\.rs::[A-Za-z0-9_]+`' "$spec" | tr -d '`' | sort -u)

# A reference that is written in another way would not be checked.
while IFS= read -r line; do
  complain "not of the form \`path/to/file.rs::test_name\`: $line"
done < <(grep -E '^- `' "$spec" | grep -vE '^- `crates/[A-Za-z0-9_./-]+\.rs::[A-Za-z0-9_]+`$' || true)

known=$(grep -oE 'id: "[A-Z]+-[0-9]+"' "$invariants" | grep -oE '[A-Z]+-[0-9]+' | sort -u)
[ -n "$known" ] || complain "no invariants found in $invariants"
stated=$(grep -E '^\*\*S-[0-9]+\*\*' "$spec" | grep -oE '\((([A-Z]{2}-[0-9]+)(, )?)+\)' | grep -oE '[A-Z]{2}-[0-9]+' | sort -u)
for id in $(comm -13 <(echo "$known") <(grep -oE '\b[A-Z]{2}-[0-9]+\b' "$spec" | sort -u)); do
  complain "invariant $id is unknown in $invariants"
done
for id in $(comm -23 <(echo "$known") <(echo "$stated")); do
  complain "invariant $id has no statement"
done

# Statements are numbered without gaps, and each has a test or says that it has none.
untested=$(awk '
  /^\*\*S-[0-9]+\*\*/ {
    if (open) print "S-" number " names no test, and does not say that there is none"
    match($0, /S-[0-9]+/); number = substr($0, RSTART + 2, RLENGTH - 2); open = 1; count++
    if (number != count) print "S-" number " stands where S-" count " is expected"
  }
  /^## / { if (open) print "S-" number " names no test, and does not say that there is none"; open = 0 }
  /^- `.*::.*`$/ || /^- \*Not tested/ { open = 0 }
  END { if (open) print "S-" number " names no test, and does not say that there is none"
        if (!count) print "no statements found" }' "$spec")
while IFS= read -r line; do
  [ -z "$line" ] || complain "$line"
done <<<"$untested"
exit $failed
