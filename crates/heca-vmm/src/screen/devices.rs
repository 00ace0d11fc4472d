//! Devices: none may move data into guest RAM past the page tables, or map guest RAM elsewhere.

use super::Finding;
use super::options::{Properties, is_on};

const PINS: &str = "it pins guest RAM for transfers by hardware; what is in flight into a page that \
     is taken out is lost silently";
const DIRECT: &str = "direct disk transfers write into guest RAM past the page tables; what is in \
     flight into a page that is taken out is lost silently";
const SECOND: &str = "another process maps guest RAM and would read pages that were taken out as \
     zeros";
const USE_VIRTIO: &str = "use an emulated or virtio device for machines with remote memory";
const USE_CACHE: &str = "use cache=writeback or cache=writethrough (libvirt: <driver cache=.../>)";
const USE_QEMU: &str = "use a device that qemu serves itself, such as virtio-net or virtio-blk; for \
     files use 9p or nfs";

/// Drivers by the beginning of their names, for `-device` and `-object`.
const DEVICES: [(&str, &str, &str); 9] = [
    ("vfio", PINS, USE_VIRTIO),
    ("vhost-vdpa", PINS, USE_VIRTIO),
    ("vhost-scsi", PINS, USE_VIRTIO),
    ("pvrdma", PINS, USE_VIRTIO),
    ("scsi-generic", DIRECT, "use scsi-hd with a buffered drive"),
    ("scsi-block", DIRECT, "use scsi-hd with a buffered drive"),
    ("vhost-user", SECOND, USE_QEMU),
    ("x-vfio-user", SECOND, USE_QEMU),
    ("x-pci-proxy", SECOND, USE_QEMU),
];

/// Block drivers that never go through the host's page cache.
const BLOCK_DRIVERS: [&str; 5] =
    ["nvme", "nvme-io_uring", "io_uring", "virtio-blk-vfio-pci", "virtio-blk-vhost-vdpa"];

/// Looks at one option.
pub(super) fn screen(name: &str, value: &Properties) -> Option<Finding> {
    let checked = ["device", "object", "netdev", "nic", "net", "drive", "blockdev"];
    if checked.contains(&name) && value.is_unreadable() {
        let why = "its json cannot be read, so what it does is unknown";
        return Some(Finding::refuse(format!("-{name}"), why, "write standard json"));
    }
    match name {
        "device" | "object" => {
            let key = if name == "device" { "driver" } else { "qom-type" };
            let driver = value.get(key)?;
            if name == "device" && value.is_on("prealloc") {
                let why = "it fills guest memory at the start, more than this host may have";
                let what = format!("-device {driver},prealloc=on");
                return Some(Finding::refuse(what, why, "use prealloc=off"));
            }
            let (_, why, fix) = DEVICES.iter().find(|(start, ..)| driver.starts_with(start))?;
            Some(Finding::refuse(format!("-{name} {driver}"), why, fix))
        }
        "netdev" | "nic" | "net" => network(name, value),
        "drive" | "blockdev" => disk(name, value),
        _ => None,
    }
}

fn network(option: &str, value: &Properties) -> Option<Finding> {
    let kind = value.get("type")?;
    let what = format!("-{option} {kind}");
    match kind {
        "vhost-vdpa" => Some(Finding::refuse(what, PINS, USE_VIRTIO)),
        "vhost-user" => Some(Finding::refuse(what, SECOND, USE_QEMU)),
        // passt serves guest RAM itself in this mode only.
        "passt" if value.is_on("vhost-user") => {
            Some(Finding::refuse(format!("{what},vhost-user=on"), SECOND, "use vhost-user=off"))
        }
        _ => None,
    }
}

fn disk(option: &str, value: &Properties) -> Option<Finding> {
    let refuse =
        |what: &str, why| Some(Finding::refuse(format!("-{option} {what}"), why, USE_CACHE));
    if let Some(cache @ ("none" | "directsync")) = value.get("cache") {
        return refuse(&format!("cache={cache}"), DIRECT);
    }
    if value.anywhere("cache.direct").any(is_on) {
        return refuse("cache.direct=on", DIRECT);
    }
    if let Some(driver) = value.anywhere("driver").find(|driver| BLOCK_DRIVERS.contains(driver)) {
        return refuse(&format!("driver={driver}"), DIRECT);
    }
    if value.anywhere("driver").any(|driver| driver == "virtio-blk-vhost-user") {
        return refuse("driver=virtio-blk-vhost-user", SECOND);
    }
    let mut files = value.anywhere("file").chain(value.anywhere("filename"));
    if files.any(|file| file.starts_with("nvme://")) {
        return refuse("file=nvme://", DIRECT);
    }
    None
}
