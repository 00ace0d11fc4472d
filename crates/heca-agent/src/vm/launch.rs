//! Starts QEMU and the pager of a VM.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use heca_api::{ApiError, Network, PagerState, VmRequest};
use heca_vmm::command_line::{self, Boot, VmPaths, VmSpec};
use heca_vmm::qmp::Qmp;

use super::process::Process;
use super::{EXIT_TIMEOUT, PAGER_START_TIMEOUT, QMP_TIMEOUT, Vm, io_error};
use crate::pager::PagerConfig;

pub(super) fn spec_of(request: &VmRequest, accel: command_line::Accel) -> Result<VmSpec, ApiError> {
    let boot = match (&request.boot.kernel, request.boot.disks.is_empty()) {
        (Some(kernel), _) => {
            Boot::Kernel { kernel: kernel.clone(), initrd: request.boot.initrd.clone() }
        }
        (None, false) => Boot::Disk,
        (None, true) => {
            return Err(ApiError::new("nothing-to-boot", "the VM has nothing to start from")
                .hint("give --kernel FILE (and --initrd FILE), or --disk FILE"));
        }
    };
    let spec = VmSpec {
        name: request.name.clone(),
        memory: request.memory,
        vcpus: request.vcpus,
        accel,
        boot,
        append: request.boot.append.clone(),
        disks: request.boot.disks.clone(),
        network: match request.network {
            Network::None => command_line::Network::None,
            Network::User => command_line::Network::User,
        },
        extra_args: request.qemu_args.clone(),
    };
    command_line::validate(&spec)
        .map_err(|error| ApiError::new("bad-request", error.to_string()))?;
    Ok(spec)
}

/// Starts a program in a process group of its own, so that a Ctrl-C in the agent's terminal does
/// not reach it.
fn spawn(command: &mut Command, log: &Path) -> Result<Child, ApiError> {
    let open = || File::options().create(true).append(true).mode(0o600).open(log);
    let file = open().map_err(|error| io_error("create", log, &error))?;
    let program = PathBuf::from(command.get_program());
    command
        .stdin(Stdio::null())
        .stderr(file)
        .process_group(0)
        .spawn()
        .map_err(|error| io_error("start", &program, &error))
}

pub(super) fn start_qemu(
    vm: &Vm,
    spec: &VmSpec,
    qemu: &Path,
    paths: &VmPaths,
) -> Result<Arc<Process>, ApiError> {
    let log = vm.dir.join("qemu.log");
    let mut command = Command::new(qemu);
    command.args(command_line::qemu_arguments(spec, paths)).stdout(Stdio::null());
    let child = spawn(&mut command, &log)?;
    Process::own(child).map(Arc::new).map_err(|error| io_error("watch", qemu, &error))
}

/// Connects to QEMU's monitor; when QEMU ends instead, its own words are the error.
pub(super) fn connect_qmp(vm: &Vm, qemu: &Process) -> Result<Qmp, ApiError> {
    let socket = vm.paths().qmp_socket;
    let deadline = Instant::now() + QMP_TIMEOUT;
    loop {
        let problem = match Qmp::connect(&socket, Duration::from_millis(500)) {
            Ok(mut qmp) => {
                qmp.set_timeout(QMP_TIMEOUT);
                return Ok(qmp);
            }
            Err(error) => error,
        };
        if qemu.wait(Duration::ZERO) {
            return Err(ApiError::new("qemu-failed", "QEMU ended at once")
                .detail(tail(&vm.dir.join("qemu.log"))));
        }
        if Instant::now() > deadline {
            return Err(ApiError::new("qemu-silent", "QEMU's monitor does not answer")
                .detail(problem.to_string()));
        }
    }
}

/// The last lines of a log.
fn tail(path: &Path) -> String {
    let mut text = String::new();
    if let Ok(mut file) = File::open(path) {
        let len = file.metadata().map_or(0, |m| m.len());
        let _ = file.seek(SeekFrom::Start(len.saturating_sub(2000)));
        let _ = file.read_to_string(&mut text);
    }
    text.trim().to_owned()
}

/// Starts a pager and waits until it serves. `started` is told of the process before that.
pub(super) fn start_pager(
    vm: &Vm,
    config: &PagerConfig,
    started: impl FnOnce(&Process),
) -> Result<(Arc<Process>, Option<String>), ApiError> {
    let program = super::lock(&vm.program).clone();
    let file = vm.dir.join("pager.json");
    let bytes = serde_json::to_vec(config).expect("plain data can be written as JSON");
    fs::write(&file, bytes).map_err(|error| io_error("write", &file, &error))?;
    let log = vm.dir.join("pager.log");
    let mut command = Command::new(program);
    command.arg("pager").arg("--config").arg(&file).arg("--socket").arg(vm.pager_socket());
    command.arg("--last").arg(vm.pager_last()).stdout(Stdio::piped());
    let mut child = spawn(&mut command, &log)?;
    let stdout = child.stdout.take().expect("standard output is piped");
    let process = Process::own(child)
        .map(Arc::new)
        .map_err(|error| io_error("watch", &vm.pager_socket(), &error))?;
    started(&process);
    let (sender, receiver) = crossbeam_channel::bounded(1);
    std::thread::spawn(move || {
        let mut line = String::new();
        let _ = BufReader::new(stdout).read_line(&mut line);
        let _ = sender.send(line);
    });
    let line = receiver.recv_timeout(PAGER_START_TIMEOUT).unwrap_or_default();
    match serde_json::from_str::<PagerState>(&line) {
        Ok(PagerState::Ready { listens }) => Ok((process, listens)),
        Ok(PagerState::Failed { error }) => {
            process.wait(EXIT_TIMEOUT);
            Err(error)
        }
        Err(_) => {
            process.kill();
            Err(ApiError::new("pager-failed", "the pager did not start").detail(tail(&log)))
        }
    }
}
