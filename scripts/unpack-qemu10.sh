#!/usr/bin/env bash
# Unpacks Debian 13's QEMU 10 with all of its libraries into a directory, and writes a wrapper
# `qemu-system-x86_64` there that runs it. Nothing of it is installed, and the system's own QEMU
# stays what it is. Live migration is measured with it: QEMU 7.2 of Debian 12 loses pages in its own
# pre-copy under TCG.
set -euo pipefail
suite=trixie
out=${1:?usage: unpack-qemu10.sh DIRECTORY}

complain() {
  echo "unpack-qemu10: $*" >&2
  exit 1
}

# The mirror that the system gets its own release from has the other one, too.
release=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
mirror=$(apt-get indextargets --format '$(RELEASE) $(COMPONENT) $(REPO_URI)' 'Created-By: Packages' |
  awk -v release="$release" '$1 == release && $2 == "main" {print $3; exit}')
[ -n "$mirror" ] || complain "apt knows no archive of Debian '$release' main;" \
  "name a QEMU 10 in HECA_QEMU10 instead"

mkdir -p "$out"
out=$(cd "$out" && pwd)
scratch=$(mktemp -d "$out/unpack.XXXXXX")
trap 'rm -rf "$scratch"' EXIT
chmod 755 "$scratch"
mkdir -p "$scratch"/{lists,cache/archives/partial,none,root}
: >"$scratch/status"

# A package manager of its own, for a system on which nothing is installed yet: so every library
# comes along. The rest of apt's configuration, such as proxies, is the system's.
write_sources() {
  printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\nSigned-By: %s\n' \
    "$mirror" "$suite" "$1" >"$scratch/$suite.sources"
}
apt=(apt-get -qq
  -o Dir::State="$scratch" -o Dir::State::Lists="$scratch/lists"
  -o Dir::State::status="$scratch/status" -o Dir::Cache="$scratch/cache"
  -o Dir::Cache::archives="$scratch/cache/archives"
  -o Dir::Etc::sourcelist="$scratch/$suite.sources" -o Dir::Etc::sourceparts="$scratch/none"
  -o Dir::Etc::preferences="$scratch/none" -o Dir::Etc::preferencesparts="$scratch/none"
  -o DPkg::Post-Invoke::= -o APT::Update::Post-Invoke::=
  -o APT::Update::Error-Mode=any -o APT::Sandbox::User=root
  -o APT::Architecture=amd64 -o APT::Architectures::=amd64
  -o APT::Install-Recommends=false -o APT::Keep-Downloaded-Packages=true)

echo "unpack-qemu10: QEMU of Debian $suite"
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
write_sources "$keyring"
if ! "${apt[@]}" update >"$scratch/log" 2>&1; then
  # An early Debian 12 does not know the keys of Debian 13. Its own archive has a newer set of keys,
  # signed with a key that it knows.
  (cd "$scratch" && { apt-get update -qq || true; } && apt-get download -qq debian-archive-keyring) \
    >>"$scratch/log" 2>&1 || complain "no keys for $suite: $(cat "$scratch/log")"
  dpkg-deb -x "$scratch"/debian-archive-keyring_*.deb "$scratch/keys"
  keyring="$scratch/keys$keyring"
  [ -e "$keyring" ] || keyring="${keyring%.gpg}.pgp"
  write_sources "$keyring"
  "${apt[@]}" update >>"$scratch/log" 2>&1 || complain "$(cat "$scratch/log")"
fi
"${apt[@]}" install -y --download-only qemu-system-x86 ipxe-qemu >>"$scratch/log" 2>&1 ||
  complain "$(cat "$scratch/log")"
for package in "$scratch"/cache/archives/*.deb; do
  dpkg-deb -x "$package" "$scratch/root"
done

# Only what QEMU reads.
mkdir -p "$scratch/kept/usr/bin" "$scratch/kept/usr/lib" "$scratch/kept/usr/share"
cp -a "$scratch/root/usr/bin/qemu-system-x86_64" "$scratch/kept/usr/bin/"
cp -a "$scratch/root/usr/lib/x86_64-linux-gnu" "$scratch/kept/usr/lib/"
cp -a "$scratch/root/usr/share/qemu" "$scratch/root/usr/share/seabios" "$scratch/kept/usr/share/"
rm -rf "$out/root"
mv "$scratch/kept" "$out/root"

# `exec -a`: whoever looks for QEMU by the name that a process was started under shall find it, not
# the dynamic linker.
cat >"$scratch/wrapper" <<'WRAPPER'
#!/usr/bin/env bash
# Runs the QEMU in this directory, by its own dynamic linker and with its own libraries.
self=$(readlink -f "${BASH_SOURCE[0]}")
usr=${self%/*}/root/usr
lib=$usr/lib/x86_64-linux-gnu
export QEMU_MODULE_DIR=$lib/qemu
exec -a "$self" "$lib/ld-linux-x86-64.so.2" --argv0 "$self" --library-path "$lib" \
  "$usr/bin/qemu-system-x86_64" -L "$usr/share/qemu" -L "$usr/share/seabios" "$@"
WRAPPER
chmod 755 "$scratch/wrapper"
# Last: its being there says that all is.
mv "$scratch/wrapper" "$out/qemu-system-x86_64"
"$out/qemu-system-x86_64" --version | head -n 1
