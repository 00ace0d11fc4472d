//! Each rule, on lines as people and libvirt write them.

use super::*;

const RAM: &str = "-machine q35,memory-backend=pc.ram \
                   -object memory-backend-file,id=pc.ram,size=1G,mem-path=/dev/shm/a,share=on";

fn arguments(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

/// The findings of a line that has proper RAM in front.
fn with_ram(line: &str) -> Vec<Finding> {
    screen_qemu_arguments(&arguments(&format!("qemu-system-x86_64 {RAM} {line}")))
}

fn refused(findings: &[Finding], what: &str) {
    let [finding] = findings else { panic!("{what}: {findings:?}") };
    assert_eq!(finding.severity, Severity::Refuse, "{finding}");
    assert!(finding.what.contains(what), "{what}: {finding}");
    assert!(!finding.why.is_empty() && !finding.fix.is_empty());
}

fn warned(findings: &[Finding], what: &str) {
    let [finding] = findings else { panic!("{what}: {findings:?}") };
    assert_eq!(finding.severity, Severity::Warning, "{finding}");
    assert!(finding.what.contains(what), "{what}: {finding}");
}

#[test]
fn libvirts_json_line_is_understood() {
    let ram = |kind: &str, share: bool| {
        let object = format!(
            r#"{{"qom-type":"{kind}","id":"pc.ram","mem-path":"/dev/shm/heca-ram/libvirt/qemu/2-d4/pc.ram","share":{share},"x-use-canonical-path-for-ramblock-id":false,"size":268435456}}"#
        );
        screen_qemu_arguments(&[
            "/usr/bin/qemu-system-x86_64".to_owned(),
            "-machine".to_owned(),
            "pc-q35-7.2,usb=off,dump-guest-core=off,memory-backend=pc.ram".to_owned(),
            "-m".to_owned(),
            "256".to_owned(),
            "-object".to_owned(),
            object,
            "-overcommit".to_owned(),
            "mem-lock=off".to_owned(),
            "-blockdev".to_owned(),
            r#"{"driver":"file","filename":"/a","node-name":"n","cache":{"direct":false}}"#.into(),
            "-device".to_owned(),
            r#"{"driver":"virtio-balloon-pci","id":"b","free-page-reporting":true}"#.to_owned(),
        ])
    };
    assert_eq!(ram("memory-backend-file", true), []);
    refused(&ram("memory-backend-file", false), "memory-backend-file,id=pc.ram");
    refused(&ram("memory-backend-ram", true), "memory-backend-ram");
    warned(&ram("memory-backend-memfd", true), "memory-backend-memfd");
    refused(&ram("memory-backend-memfd", false), "memory-backend-memfd");
}

#[test]
fn private_ram_is_refused() {
    let screen = |line: &str| screen_qemu_arguments(&arguments(line));
    refused(&screen(""), "without a memory-backend-file");
    refused(&screen("qemu -m 1G"), "without a memory-backend-file");
    refused(&screen("-m 1G -mem-path /dev/shm"), "-mem-path");
    refused(
        &screen("-object memory-backend-file,id=r,size=1G,mem-path=/dev/shm/a,share=on"),
        "-object memory-backend-file",
    );
    refused(&screen("-machine q35,memory-backend=pc.ram"), "memory-backend=pc.ram");
    refused(
        &screen("-M q35,memory-backend=r -object memory-backend-ram,id=r,size=1G,share=on"),
        "memory-backend-ram",
    );
    refused(
        &screen("-M q35,memory-backend=r -object memory-backend-file,id=r,size=1G,mem-path=/a"),
        "memory-backend-file",
    );
    refused(&with_ram("-machine memory-backend=other"), "other");
}

#[test]
fn numa_nodes_and_added_modules_are_told_apart() {
    let node = "-object memory-backend-file,id=n0,size=1G,mem-path=/dev/shm/n,share=";
    let screen = |share: &str| {
        screen_qemu_arguments(&arguments(&format!("{node}{share} -numa node,memdev=n0")))
    };
    assert_eq!(screen("on"), []);
    refused(&screen("off"), "id=n0");
    warned(
        &with_ram("-object memory-backend-ram,id=d1,size=1G -device pc-dimm,memdev=d1"),
        "id=d1",
    );
}

#[test]
fn memory_that_fills_or_locks_itself_is_refused() {
    let ram = |more: &str| screen_qemu_arguments(&arguments(&format!("{RAM},{more}")));
    refused(&ram("prealloc=on"), "prealloc=on");
    refused(&ram("mem-path=/dev/hugepages/libvirt/qemu/1-a"), "/dev/hugepages");
    warned(&ram("discard-data=on"), "discard-data=on");
    assert_eq!(ram("prealloc=off,discard-data=off"), []);
    refused(&with_ram("-mem-prealloc"), "-mem-prealloc");
    refused(&with_ram("-overcommit mem-lock=on"), "mem-lock=on");
    refused(&with_ram("-overcommit mem-lock=on-fault,cpu-pm=off"), "mem-lock=on-fault");
    refused(&with_ram("-realtime mlock=on"), "mlock");
    assert_eq!(with_ram("-overcommit mem-lock=off,cpu-pm=on -realtime mlock=off"), []);
    refused(&with_ram("-device virtio-mem-pci,memdev=m,prealloc=on"), "prealloc=on");
    let memfd = "-M q35,memory-backend=m -object memory-backend-memfd,id=m,size=1G,hugetlb=on";
    let findings = screen_qemu_arguments(&arguments(memfd));
    assert_eq!(findings.len(), 2, "{findings:?}");
    refused(&findings[1..], "hugetlb");
}

#[test]
fn direct_disks_are_refused_and_buffered_ones_pass() {
    for (line, what) in [
        ("-drive file=a.img,if=virtio,cache=none", "cache=none"),
        ("-drive file=a.img,cache=directsync", "cache=directsync"),
        ("-drive file=a.img,cache.direct=on,aio=native", "cache.direct=on"),
        ("-drive file=a.img,file.cache.direct=true", "cache.direct=on"),
        ("-blockdev driver=file,filename=a.img,node-name=a,cache.direct=on", "cache.direct=on"),
        (r#"-blockdev {"driver":"file","filename":"a","cache":{"direct":true}}"#, "cache.direct"),
        (r#"-drive file=json:{"driver":"file",,"cache":{"direct":true}}"#, "cache.direct=on"),
        (r#"-blockdev {"driver":"raw","file":{"driver":"nvme","device":"0"}}"#, "driver=nvme"),
        ("-drive file=nvme://0000:01:00.0/1,if=none", "nvme://"),
        ("-blockdev io_uring,filename=/dev/sdb,node-name=a", "driver=io_uring"),
        ("-blockdev virtio-blk-vhost-user,path=/a,node-name=a", "virtio-blk-vhost-user"),
        ("-device scsi-generic,drive=a", "scsi-generic"),
        ("-device scsi-block,drive=a", "scsi-block"),
    ] {
        refused(&with_ram(line), what);
    }
    for line in [
        "-drive file=a.img,if=virtio,aio=io_uring",
        "-drive file=a.img,cache=writeback,aio=threads -drive file=b,cache=writethrough",
        "-drive file=cache=none",
        r#"-blockdev {"driver":"qcow2","file":"a","cache":{"direct":false,"no-flush":false}}"#,
        "-device scsi-hd,drive=a -device virtio-blk-pci,drive=b -hda c.img",
    ] {
        assert_eq!(with_ram(line), [], "{line}");
    }
}

#[test]
fn devices_that_pin_or_share_guest_ram_are_refused() {
    for (line, what) in [
        ("-device vfio-pci,host=01:00.0", "-device vfio-pci"),
        (r#"-device {"driver":"vfio-pci","host":"0000:01:00.0"}"#, "vfio-pci"),
        ("-device driver=vfio-ccw", "vfio-ccw"),
        ("-device vhost-vdpa-device-pci,vhostdev=/dev/vhost-vdpa-0", "vhost-vdpa"),
        ("-netdev vhost-vdpa,id=n,vhostdev=/dev/vhost-vdpa-0", "-netdev vhost-vdpa"),
        ("-device vhost-scsi-pci,wwpn=naa.1", "vhost-scsi-pci"),
        ("-device vhost-user-fs-pci,chardev=c,tag=t", "vhost-user-fs-pci"),
        ("-device vhost-user-blk-pci,chardev=c", "vhost-user-blk-pci"),
        ("-netdev vhost-user,id=n,chardev=c", "-netdev vhost-user"),
        (r#"-netdev {"type":"vhost-user","id":"n","chardev":"c"}"#, "-netdev vhost-user"),
        ("-netdev passt,id=n,vhost-user=on", "passt"),
        ("-object vhost-user-backend,id=v,chardev=c", "vhost-user-backend"),
        ("-machine confidential-guest-support=sev0", "confidential-guest-support"),
    ] {
        refused(&with_ram(line), what);
    }
    for line in [
        "-netdev tap,id=n,vhost=on -device virtio-net-pci,netdev=n -nic user",
        "-device virtio-balloon-pci,free-page-reporting=on -device vhost-vsock-pci,guest-cid=3",
        "-fsdev local,id=f,path=/a,security_model=none -object rng-random,id=r",
        "-append vfio-pci -name -device",
    ] {
        assert_eq!(with_ram(line), [], "{line}");
    }
    warned(&with_ram("-readconfig /etc/vm.cfg"), "-readconfig");
    refused(&with_ram("-device {'driver':'vfio-pci'}"), "-device");
    refused(&with_ram("-drive file=json:{"), "-drive");
    warned(&with_ram("-set drive.a.cache=none"), "-set");
}

#[test]
fn a_process_command_line_is_split_at_zero_bytes() {
    assert_eq!(split_cmdline(b"qemu\0-m\x001G\0-append\0\0"), ["qemu", "-m", "1G", "-append", ""]);
    assert!(split_cmdline(b"").is_empty());
    assert_eq!(split_cmdline(b"\xff\0"), ["\u{fffd}"]);
}
