#!/usr/bin/env bash
# Rules of the tree that no compiler checks: where unsafe code may be, and that it is explained.
set -euo pipefail
cd "$(dirname "$0")/.."
failed=0
complain() {
  echo "check-tree: $1" >&2
  shift
  printf '  %s\n' "$@" >&2
  failed=1
}

mapfile -t sources < <(find crates -name '*.rs' | sort)

# Every crate but heca-sys forbids unsafe code (tests of the crates have no unsafe code, either).
outside=$(grep -nE '\bunsafe (\{|fn|impl|extern)' "${sources[@]}" | grep -v '^crates/heca-sys/' || true)
[ -z "$outside" ] || complain "unsafe code outside of heca-sys:" "$outside"
for root in crates/*/src/lib.rs crates/*/src/main.rs crates/*/src/bin/*.rs; do
  [ -f "$root" ] || continue
  case $root in crates/heca-sys/*) continue ;; esac
  grep -q '^#!\[forbid(unsafe_code)\]' "$root" || complain "$root does not forbid unsafe code"
done

# Every unsafe block says why it is sound.
for file in $(find crates/heca-sys -name '*.rs'); do
  unexplained=$(awk -v f="$file" '/SAFETY:/{last=FNR} /unsafe (\{|impl)/{ if (!last || FNR-last>8) print f":"FNR }' "$file")
  [ -z "$unexplained" ] || complain "unsafe without a SAFETY line:" "$unexplained"
done

# Pure crates stay pure.
for crate in heca-types heca-wire heca-core heca-sim; do
  impure=$(grep -nE '^(tokio|rustix|libc|rand)\b' "crates/$crate/Cargo.toml" || true)
  [ -z "$impure" ] || complain "$crate must do no I/O:" "$impure"
done

long=$(wc -l "${sources[@]}" | awk '$2 != "total" && $2 !~ /tests?[\/.]/ && $1 > 600 {print $2": "$1" lines"}')
[ -z "$long" ] || complain "files over 600 lines:" "$long"
scripts/check-spec.sh || failed=1
exit $failed
