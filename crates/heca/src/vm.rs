//! `heca vm`.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use heca_agent::agent::socket_path;
use heca_api::{Boot, Client, Resize, Stop, VmInfo, VmRequest, VmState};
use rustix::termios::{OptionalActions, isatty, tcgetattr, tcsetattr};

use crate::cli::{RunArguments, VmArguments, VmCommand};
use crate::{migrate, output};

/// Byte that leaves the console: Ctrl-].
const LEAVE: u8 = 0x1d;

pub async fn run(arguments: VmArguments) -> anyhow::Result<ExitCode> {
    let client = Client::new(&socket_path(&arguments.run_dir));
    match arguments.command {
        VmCommand::Run(run) => return start(&client, *run).await,
        VmCommand::List { json } => {
            let infos: Vec<VmInfo> = client.get("/v1/vms").await?;
            if json {
                println!("{}", serde_json::to_string_pretty(&infos)?);
            } else {
                output::print_vms(&infos);
            }
        }
        VmCommand::Show { name, json, watch } => show(&client, &name, json, watch).await?,
        VmCommand::Stop { name, grace, now } => {
            let grace_ms = if now { 0 } else { grace * 1000 };
            let _: VmInfo =
                client.post(&format!("/v1/vms/{name}/stop"), &Stop { grace_ms }).await?;
            println!("{name} stopped");
        }
        VmCommand::Console { name } => {
            let info: VmInfo = client.get(&format!("/v1/vms/{name}")).await?;
            if info.state == VmState::Stopped {
                anyhow::bail!(
                    "{name} is stopped; its console's log: {}",
                    info.console_log.display()
                );
            }
            console(&info.console)?;
        }
        VmCommand::AddSponsor { name, sponsor } => {
            let _: VmInfo = client.post(&format!("/v1/vms/{name}/sponsors"), &sponsor).await?;
            println!("{name}: {} is a sponsor of it now", sponsor.address);
        }
        VmCommand::Migrate(arguments) => return migrate::run(&client, arguments).await,
        VmCommand::Migration { name, json } => {
            let info = client.get(&format!("/v1/vms/{name}/migration")).await?;
            migrate::print(&info, json)?;
        }
        VmCommand::MigrateCancel { name } => {
            let path = format!("/v1/vms/{name}/migration/cancel");
            let _: heca_api::MigrationInfo = client.post(&path, &serde_json::json!({})).await?;
            println!("{name} stays here");
        }
        VmCommand::MigrateResolve { name, run_here, .. } => {
            let path = format!("/v1/vms/{name}/migration/resolve");
            let () = client.post(&path, &heca_api::ResolveMigration { run_here }).await?;
            println!("{name} {}", if run_here { "goes on here" } else { "is another host's" });
        }
        VmCommand::Resize { name, local } => {
            let path = format!("/v1/vms/{name}");
            let now: VmInfo = client.get(&path).await?;
            let (local, auto_local) = local.resolve(now.memory, Some(now.local));
            let resize = Resize { local, auto_local };
            let info: VmInfo = client.post(&format!("{path}/resize"), &resize).await?;
            println!("{name}: local budget is {} now", output::budget(&info));
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn start(client: &Client, run: RunArguments) -> anyhow::Result<ExitCode> {
    // Absolute paths: the agent has a working directory of its own.
    let absolute = |path: &Path| std::path::absolute(path);
    let (local, auto_local) = run.pool.local.resolve(run.memory, None);
    let request = VmRequest {
        name: run.name.clone(),
        memory: run.memory,
        local,
        auto_local,
        replicas: run.pool.replicas,
        sponsors: run.pool.sponsors,
        vcpus: run.vcpus,
        accel: run.accel,
        boot: Boot {
            append: if run.kernel.is_some() { run.append } else { String::new() },
            kernel: run.kernel.as_deref().map(absolute).transpose()?,
            initrd: run.initrd.as_deref().map(absolute).transpose()?,
            disks: run.disks.iter().map(|d| absolute(d)).collect::<Result<_, _>>()?,
        },
        network: run.network,
        eviction: run.pool.eviction,
        prefetch: !run.pool.no_prefetch,
        encrypt: run.encrypt,
        qemu: run.qemu,
        qemu_args: run.qemu_args,
    };
    let starting = client.post::<VmInfo>("/v1/vms", &request);
    let info = tokio::select! {
        info = starting => info?,
        _ = tokio::signal::ctrl_c() => {
            // The agent goes on with the start: wait for it to know the VM, then end it.
            eprintln!("interrupted: stopping {}", run.name);
            let stop = Stop { grace_ms: 0 };
            let path = format!("/v1/vms/{}/stop", run.name);
            for _ in 0..100 {
                let running: Result<VmInfo, _> = client.get(&format!("/v1/vms/{}", run.name)).await;
                match running {
                    Ok(info) if info.state == VmState::Starting => {}
                    Ok(_) => {
                        let _ = client.post::<VmInfo>(&path, &stop).await;
                        break;
                    }
                    Err(_) => break,
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            return Ok(ExitCode::from(130));
        }
    };
    if run.json {
        println!("{}", serde_json::to_string_pretty(&info)?);
    } else {
        println!(
            "{} runs: {} of memory, at most {} of it here ({}, {})",
            info.name,
            info.memory,
            output::budget(&info),
            info.accel,
            info.pager.as_ref().map_or("no figures yet", |stats| &stats.eviction)
        );
        println!("  heca vm show {0} --watch   heca vm console {0}   heca vm stop {0}", info.name);
    }
    Ok(ExitCode::SUCCESS)
}

async fn show(client: &Client, name: &str, json: bool, watch: bool) -> anyhow::Result<()> {
    loop {
        let info: VmInfo = client.get(&format!("/v1/vms/{name}")).await?;
        match (json, watch) {
            (true, true) => println!("{}", serde_json::to_string(&info)?),
            (true, false) => println!("{}", serde_json::to_string_pretty(&info)?),
            (false, false) => output::print_vm(&info),
            (false, true) => match &info.pager {
                Some(stats) => println!("{}", output::line(stats)),
                None => println!("{name}: no figures"),
            },
        }
        if !watch || info.state == VmState::Stopped {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// Puts the terminal back when dropped.
struct RawTerminal(rustix::termios::Termios);

impl RawTerminal {
    fn enter() -> Option<Self> {
        let stdin = std::io::stdin();
        if !isatty(&stdin) {
            return None;
        }
        let saved = tcgetattr(&stdin).ok()?;
        let mut raw = saved.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw).ok()?;
        Some(Self(saved))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, &self.0);
    }
}

/// Connects the terminal to a serial console.
fn console(socket: &Path) -> anyhow::Result<()> {
    use rustix::event::{PollFd, PollFlags, poll};
    let mut stream = UnixStream::connect(socket)?;
    eprintln!("connected; Ctrl-] leaves");
    let _raw = RawTerminal::enter();
    let stdin = std::io::stdin();
    let mut stdout = std::io::stdout();
    let mut buffer = [0u8; 4096];
    let mut input_open = true;
    loop {
        let mut fds = vec![PollFd::from_borrowed_fd(stream.as_fd(), PollFlags::IN)];
        if input_open {
            fds.push(PollFd::from_borrowed_fd(stdin.as_fd(), PollFlags::IN));
        }
        poll(&mut fds, None)?;
        let from_vm = !fds[0].revents().is_empty();
        let from_user = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
        if from_vm {
            let n = stream.read(&mut buffer)?;
            if n == 0 {
                eprintln!("\r\nthe console ended");
                return Ok(());
            }
            stdout.write_all(&buffer[..n])?;
            stdout.flush()?;
        }
        if from_user {
            let n = rustix::io::read(&stdin, &mut buffer)?;
            input_open = n > 0;
            if let Some(end) = buffer[..n].iter().position(|&b| b == LEAVE) {
                stream.write_all(&buffer[..end])?;
                return Ok(());
            }
            stream.write_all(&buffer[..n])?;
        }
    }
}
