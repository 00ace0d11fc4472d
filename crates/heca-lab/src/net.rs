//! Network namespaces joined by a bridge.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::host::Host;

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Several hosts on one machine. See the crate's documentation.
#[derive(Debug)]
pub struct Lab {
    id: String,
    dir: PathBuf,
    memory_dir: PathBuf,
    namespaces: Vec<String>,
    mounts: Vec<PathBuf>,
    hosts: Vec<Host>,
}

/// Runs a command and fails with its words if it fails.
pub(crate) fn run(program: &str, arguments: &[&str]) -> anyhow::Result<()> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("run {program}; `make deps` installs it"))?;
    ensure!(
        output.status.success(),
        "{program} {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

impl Lab {
    /// Makes `hosts` hosts, each with an address in one network, and starts nothing in them.
    ///
    /// # Errors
    /// Missing rights or tools.
    pub fn new(hosts: usize) -> anyhow::Result<Self> {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let id = format!("heca{}x{number}", std::process::id());
        let dir = std::env::temp_dir().join(&id);
        let memory_dir = Path::new("/dev/shm").join(&id);
        fs::create_dir_all(&dir)?;
        fs::create_dir_all(&memory_dir)?;
        // From here on `Drop` takes back what was made.
        let (namespaces, mounts, hosts_made) = (Vec::new(), Vec::new(), Vec::new());
        let mut lab = Self { id, dir, memory_dir, namespaces, mounts, hosts: hosts_made };
        let hub = lab.namespace("net")?;
        run("ip", &["-n", &hub, "link", "add", "bridge", "type", "bridge"])?;
        run("ip", &["-n", &hub, "link", "set", "bridge", "up"])?;
        for position in 1..=hosts {
            let name = lab.namespace(&format!("h{position}"))?;
            let port = format!("p{position}");
            let address = format!("10.77.0.{position}");
            let veth = ["link", "add", "eth0", "netns", &name, "type", "veth"];
            let peer = ["peer", "name", &port, "netns", &hub];
            run("ip", &[&veth[..], &peer[..]].concat())?;
            run("ip", &["-n", &hub, "link", "set", &port, "master", "bridge", "up"])?;
            let with_prefix = format!("{address}/24");
            run("ip", &["-n", &name, "address", "add", &with_prefix, "dev", "eth0"])?;
            run("ip", &["-n", &name, "link", "set", "eth0", "up"])?;
            run("ip", &["-n", &name, "link", "set", "lo", "up"])?;
            let host = Host::new(&name, &address, &lab.dir, &lab.memory_dir, position);
            lab.hosts.push(host);
        }
        Ok(lab)
    }

    fn namespace(&mut self, suffix: &str) -> anyhow::Result<String> {
        let name = format!("{}-{suffix}", self.id);
        run("ip", &["netns", "add", &name])?;
        self.namespaces.push(name.clone());
        Ok(name)
    }

    /// A directory for the lab's files.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The directory on tmpfs that holds all memory of the lab's hosts.
    #[must_use]
    pub fn memory_dir(&self) -> &Path {
        &self.memory_dir
    }

    /// A host, counted from 1 as in its address.
    #[must_use]
    pub fn host(&mut self, number: usize) -> &mut Host {
        &mut self.hosts[number - 1]
    }

    /// Takes a host's cable out, or puts it back.
    ///
    /// # Errors
    /// Those of `ip`.
    pub fn set_link(&self, number: usize, up: bool) -> anyhow::Result<()> {
        let hub = format!("{}-net", self.id);
        let state = if up { "up" } else { "down" };
        run("ip", &["-n", &hub, "link", "set", &format!("p{number}"), state])
    }

    /// Has one host throw away everything that it would send to another one, or stop to do so. The
    /// other direction goes on.
    ///
    /// # Errors
    /// Those of `ip`.
    pub fn set_mute(&self, from: usize, to: usize, mute: bool) -> anyhow::Result<()> {
        let (from, to) = (&self.hosts[from - 1], &self.hosts[to - 1]);
        let address = format!("{}/32", to.address());
        let verb = if mute { "add" } else { "delete" };
        run("ip", &["-n", from.namespace(), "route", verb, "blackhole", &address])
    }

    /// Bounds what a host sends, in Mbit/s, or lifts the bound. Fast links have short queues.
    ///
    /// # Errors
    /// Those of `tc`.
    pub fn set_rate(&self, number: usize, mbit_s: Option<u32>) -> anyhow::Result<()> {
        let namespace = self.hosts[number - 1].namespace();
        match mbit_s {
            Some(mbit_s) => {
                let rate = format!("{mbit_s}mbit");
                let (burst, latency) = match mbit_s {
                    // What comes between two looks of the kernel at the bucket must fit into it.
                    1000.. => (format!("{}kb", mbit_s / 5), "4ms"),
                    _ => ("64kb".to_owned(), "400ms"),
                };
                let tbf = ["tbf", "rate", &rate, "burst", &burst, "latency", latency];
                let add = ["-n", namespace, "qdisc", "add", "dev", "eth0", "root"];
                run("tc", &[&add[..], &tbf[..]].concat())
            }
            None => run("tc", &["-n", namespace, "qdisc", "delete", "dev", "eth0", "root"]),
        }
    }

    /// Gives a host a tmpfs of its own for its memory, so that it can be full.
    ///
    /// # Errors
    /// Those of `mount`.
    pub fn limit_memory(&mut self, number: usize, bytes: u64) -> anyhow::Result<()> {
        let dir = self.hosts[number - 1].memory_dir().to_owned();
        fs::create_dir_all(&dir)?;
        let size = format!("size={bytes}");
        run("mount", &["-t", "tmpfs", "-o", &size, "heca-lab", &dir.to_string_lossy()])?;
        self.mounts.push(dir);
        Ok(())
    }

    /// Ends processes of the lab that outlived their agent: those that name one of its files.
    fn end_strays(&self) {
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let name = entry.file_name();
            let pid = name.to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
            let Some(pid) = pid.filter(|pid| *pid != rustix::process::getpid()) else { continue };
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            // With the slash, `heca12x1` is not `heca12x10`.
            if String::from_utf8_lossy(&command).contains(&format!("/{}/", self.id)) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // The demander first, so that its regions are given back.
        for host in &mut self.hosts {
            host.stop_agent();
        }
        self.end_strays();
        for mount in &self.mounts {
            let _ = run("umount", &["--lazy", &mount.to_string_lossy()]);
        }
        for namespace in &self.namespaces {
            let _ = run("ip", &["netns", "delete", namespace]);
        }
        let _ = fs::remove_dir_all(&self.dir);
        let _ = fs::remove_dir_all(&self.memory_dir);
    }
}
