#!/usr/bin/env bash
# Installs what the demo, the tests and the benchmarks need, on Debian 12 or newer. Does nothing
# where all is there.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(qemu-system-x86 busybox-static mbw iproute2 binutils)
missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done

target=${CARGO_TARGET_DIR:-target}
kernel_dir="$target/lab/kernel"
shopt -s nullglob
kernels=(/boot/vmlinuz-*cloud* "$kernel_dir"/boot/vmlinuz-*cloud*)
shopt -u nullglob
if [ -n "${HECA_KERNEL:-}" ]; then kernels+=("$HECA_KERNEL"); fi

wants_qemu10() { [ -z "${HECA_QEMU10:-}" ] && [ ! -x "$target/lab/qemu10/qemu-system-x86_64" ]; }

if [ ${#missing[@]} -eq 0 ] && [ ${#kernels[@]} -gt 0 ] && ! wants_qemu10; then
  exit 0
fi
if ! command -v apt-get >/dev/null; then
  echo "install-deps: this is no Debian system. Install by hand: ${packages[*]}," >&2
  echo "name a Linux kernel for the guest in HECA_KERNEL, and a QEMU 10 in HECA_QEMU10." >&2
  exit 1
fi

export DEBIAN_FRONTEND=noninteractive
if [ ${#missing[@]} -gt 0 ] || [ ${#kernels[@]} -eq 0 ]; then
  if [ "$(id -u)" -ne 0 ]; then
    echo "install-deps: run as root to install: ${missing[*]:-a guest kernel}" >&2
    exit 1
  fi
  echo "install-deps: ${missing[*]:-} ${kernels[*]:-guest kernel}"
  apt-get update -qq
fi
if [ ${#missing[@]} -gt 0 ]; then
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi
if [ ${#kernels[@]} -eq 0 ]; then
  # Unpacked beside the build, not installed: the host's own boot menu is none of our business.
  package=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image-.*cloud-amd64/ {print $2; exit}')
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  chmod 755 "$scratch"
  (cd "$scratch" && apt-get download -qq "$package")
  dpkg-deb -x "$scratch"/*.deb "$scratch/root"
  mkdir -p "$kernel_dir/boot"
  cp "$scratch"/root/boot/vmlinuz-*cloud* "$kernel_dir/boot/"
fi
if wants_qemu10; then
  scripts/unpack-qemu10.sh "$target/lab/qemu10"
fi
