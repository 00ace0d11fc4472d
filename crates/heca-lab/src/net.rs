//! Network namespaces joined by a bridge.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, ensure};

use crate::host::Host;

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Several hosts on one machine. See the crate's documentation.
#[derive(Debug)]
pub struct Lab {
    id: String,
    dir: PathBuf,
    memory_dir: PathBuf,
    namespaces: Vec<String>,
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
        let mut lab = Self { id, dir, memory_dir, namespaces: Vec::new(), hosts: Vec::new() };
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
}

impl Drop for Lab {
    fn drop(&mut self) {
        // The demander first, so that its regions are given back.
        for host in &mut self.hosts {
            host.stop_agent();
        }
        for namespace in &self.namespaces {
            let _ = run("ip", &["netns", "delete", namespace]);
        }
        let _ = fs::remove_dir_all(&self.dir);
        let _ = fs::remove_dir_all(&self.memory_dir);
    }
}
