//! The command line and the QMP client against the QEMU of this machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use heca_types::ByteSize;
use heca_vmm::command_line::{Accel, Boot, Network, VmPaths, VmSpec, qemu_arguments, validate};
use heca_vmm::host::{find_qemu, qemu_version};
use heca_vmm::qmp::{Qmp, QmpError};
use heca_vmm::screen::{screen_qemu_arguments, split_cmdline};

/// Ends QEMU and removes its RAM file, also when an assertion fails.
struct Guard {
    child: Child,
    ram_file: PathBuf,
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.ram_file);
    }
}

fn host_kernel() -> Option<PathBuf> {
    let files = fs::read_dir("/boot").ok()?.flatten().map(|entry| entry.path());
    let is_kernel = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("vmlinuz-") && name.ends_with("-cloud-amd64")
    };
    files.filter(is_kernel).find(|path| fs::File::open(path).is_ok())
}

fn wait_for_exit(child: &mut Child) -> bool {
    let deadline = Instant::now() + Duration::from_secs(20);
    while Instant::now() < deadline {
        if child.try_wait().expect("the child has not been waited for").is_some() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    false
}

fn paths_in(directory: &Path) -> VmPaths {
    VmPaths {
        ram_file: format!("/dev/shm/heca-vmm-test,{}", std::process::id()).into(),
        qmp_socket: directory.join("qmp"),
        console_socket: directory.join("console"),
        console_log: directory.join("console,1.log"),
    }
}

#[test]
fn a_paused_machine_answers_and_quits() {
    let (Ok(qemu), Some(kernel)) = (find_qemu(None), host_kernel()) else {
        println!("skipped: needs qemu-system-x86_64 and a readable /boot/vmlinuz-*-cloud-amd64");
        return;
    };
    // Commas and colons in names exercise the escaping with a real parser.
    let directory = tempfile::Builder::new().prefix("vmm,test:").tempdir().unwrap();
    let disk = directory.path().join("disk,0.img");
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let initrd = directory.path().join("initrd,a:b");
    fs::write(&initrd, "not one, but qemu only loads it").unwrap();
    let paths = paths_in(directory.path());
    let spec = VmSpec {
        name: "test_1.a-b".to_owned(),
        memory: ByteSize(64 << 20),
        vcpus: 2,
        accel: Accel::Tcg,
        boot: Boot::Kernel { kernel, initrd: Some(initrd) },
        append: "console=ttyS0".to_owned(),
        disks: vec![disk],
        network: Network::User,
        extra_args: Vec::new(),
    };
    validate(&spec).unwrap();
    let child = Command::new(&qemu)
        .args(qemu_arguments(&spec, &paths))
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let mut guard = Guard { child, ram_file: paths.ram_file.clone() };

    let mut qmp = Qmp::connect(&paths.qmp_socket, Duration::from_secs(30)).unwrap();
    assert_eq!(qmp.query_status().unwrap(), "prelaunch");
    assert_eq!(qmp.query_version().unwrap(), qemu_version(&qemu).unwrap());
    let backends = qmp.execute("query-memdev", serde_json::Value::Null).unwrap();
    assert_eq!((&backends[0]["id"], &backends[0]["share"]), (&"pc.ram".into(), &true.into()));
    assert_eq!(backends[0]["size"], spec.memory.0);
    assert_eq!(fs::metadata(&paths.ram_file).unwrap().len(), spec.memory.0);
    assert!(paths.console_log.exists() && paths.console_socket.exists());
    let refused = qmp.execute("no-such-command", serde_json::json!({}));
    assert!(matches!(refused, Err(QmpError::Command { class, .. }) if class == "CommandNotFound"));

    let cmdline = fs::read(format!("/proc/{}/cmdline", guard.child.id())).unwrap();
    assert_eq!(screen_qemu_arguments(&split_cmdline(&cmdline)), []);

    qmp.quit().unwrap();
    assert!(wait_for_exit(&mut guard.child), "qemu did not end after quit");
}
