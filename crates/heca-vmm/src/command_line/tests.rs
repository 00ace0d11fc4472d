//! Tests of the builder and of the checks before it.

use std::fs;

use super::*;
use crate::screen::screen_qemu_arguments;

fn spec() -> VmSpec {
    VmSpec {
        name: "a1".to_owned(),
        memory: ByteSize(512 << 20),
        vcpus: 2,
        accel: Accel::Tcg,
        boot: Boot::Kernel { kernel: "/proc/self/exe".into(), initrd: None },
        append: "console=ttyS0 quiet".to_owned(),
        disks: Vec::new(),
        network: Network::None,
        extra_args: Vec::new(),
    }
}

fn paths() -> VmPaths {
    VmPaths {
        ram_file: "/dev/shm/heca/a1/ram".into(),
        qmp_socket: "/run/heca/a1/qmp".into(),
        console_socket: "/run/heca/a1/console".into(),
        console_log: "/var/log/heca/a1,b.log".into(),
    }
}

#[test]
fn the_whole_line_of_a_kernel_guest() {
    let expected = [
        "-name guest=heca-a1,debug-threads=on -S -nodefaults -no-user-config -display none",
        &format!("-machine {MACHINE},memory-backend=pc.ram,usb=off"),
        "-accel tcg,thread=multi -cpu max -m 512M -object memory-backend-file,id=pc.ram,\
         size=536870912,mem-path=/dev/shm/heca/a1/ram,share=on,prealloc=off -smp 2",
        "-qmp unix:/run/heca/a1/qmp,server=on,wait=off -chardev socket,id=console,\
         path=/run/heca/a1/console,server=on,wait=off,logfile=/var/log/heca/a1,,b.log,logappend=on",
        "-serial chardev:console -kernel /proc/self/exe -append console=ttyS0 quiet",
    ];
    assert_eq!(qemu_arguments(&spec(), &paths()).join(" "), expected.join(" "));
}

#[test]
fn disks_are_buffered_and_their_names_escaped() {
    let mut spec = spec();
    spec.boot = Boot::Disk;
    spec.append.clear();
    spec.accel = Accel::Kvm;
    spec.network = Network::User;
    spec.disks = vec!["/vm/a,b.QCOW2".into(), "vm:1.img".into()];
    spec.extra_args = vec!["-incoming".to_owned(), "defer".to_owned()];
    let line = qemu_arguments(&spec, &paths()).join(" ");
    let end = "-drive file=/vm/a,,b.QCOW2,if=virtio,format=qcow2,cache=writeback,aio=threads \
               -drive file=./vm:1.img,if=virtio,format=raw,cache=writeback,aio=threads \
               -nic user,model=virtio-net-pci -incoming defer";
    assert!(line.ends_with(end), "{line}");
    assert!(line.contains("-accel kvm -cpu host"), "{line}");
    assert!(!line.contains("-kernel") && !line.contains("-append"), "{line}");
}

#[test]
fn what_is_built_passes_the_screen() {
    let mut spec = spec();
    spec.disks = vec!["/vm/a.img".into()];
    spec.network = Network::User;
    assert_eq!(screen_qemu_arguments(&qemu_arguments(&spec, &paths())), []);
    assert_eq!(validate(&self::spec()), Ok(()));
}

#[test]
fn bad_values_are_refused() {
    for name in ["", "-a", ".a", "a b", "a,b", "a/b", "\u{e9}", &"a".repeat(64)] {
        let spec = VmSpec { name: name.to_owned(), ..spec() };
        assert!(matches!(validate(&spec), Err(SpecError::Name { .. })), "{name}");
    }
    assert_eq!(validate(&VmSpec { name: "9".repeat(63), ..spec() }), Ok(()));
    for bytes in [0, (64 << 20) - 1, (1 << 40) + (1 << 20), u64::MAX] {
        let spec = VmSpec { memory: ByteSize(bytes), ..spec() };
        assert!(matches!(validate(&spec), Err(SpecError::MemoryRange { .. })), "{bytes}");
    }
    let spec_of = |bytes| VmSpec { memory: ByteSize(bytes), ..spec() };
    let odd = (64 << 20) + 4096;
    assert_eq!(validate(&spec_of(odd)), Err(SpecError::MemoryStep { bytes: odd }));
    assert_eq!(validate(&spec_of(1 << 40)), Ok(()));
    for vcpus in [0, 257] {
        assert_eq!(validate(&VmSpec { vcpus, ..spec() }), Err(SpecError::Vcpus { vcpus }));
    }
}

#[test]
fn something_must_be_there_to_boot() {
    let mut machine = spec();
    machine.boot = Boot::Disk;
    assert_eq!(validate(&machine), Err(SpecError::NothingToBoot));
    let directory = tempfile::tempdir().unwrap();
    let disk = directory.path().join("a.img");
    machine.disks = vec![disk.clone()];
    assert_eq!(validate(&machine), Err(SpecError::AppendWithoutKernel));
    machine.append.clear();
    assert_eq!(validate(&machine), Err(SpecError::NoFile { role: "disk", path: disk.clone() }));
    fs::write(&disk, "x").unwrap();
    assert_eq!(validate(&machine), Ok(()));
    let kernel = directory.path().to_owned();
    machine.boot = Boot::Kernel { kernel: kernel.clone(), initrd: None };
    assert_eq!(validate(&machine), Err(SpecError::NoFile { role: "kernel", path: kernel }));
    let boot = Boot::Kernel { kernel: disk, initrd: Some("/nonexistent".into()) };
    let error = validate(&VmSpec { boot, ..machine }).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the initrd /nonexistent is not an existing file: check the path"
    );
}

#[test]
fn extra_arguments_cannot_undo_what_paging_needs() {
    for extra in [
        "-device vfio-pci,host=01:00.0",
        "-mem-prealloc",
        "-machine memory-backend=other",
        "-drive file=x.img,cache=none",
    ] {
        let extra_args = extra.split(' ').map(str::to_owned).collect();
        let error = validate(&VmSpec { extra_args, ..spec() }).unwrap_err();
        assert!(matches!(error, SpecError::ExtraArgument { .. }), "{extra}: {error}");
    }
    let extra_args = vec!["-device".to_owned(), "virtio-balloon-pci".to_owned()];
    assert_eq!(validate(&VmSpec { extra_args, ..spec() }), Ok(()));
}

#[test]
fn a_description_survives_json() {
    let text = serde_json::to_string(&spec()).unwrap();
    assert_eq!(serde_json::from_str::<VmSpec>(&text).unwrap(), spec());
}
