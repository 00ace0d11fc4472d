//! A sponsor in a process of its own, as on another host.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;

/// An agent that offers memory on the loopback interface; ended when dropped.
pub(super) struct BenchSponsor {
    child: Child,
    pub(super) address: String,
}

impl BenchSponsor {
    pub(super) fn start(
        dir: &Path,
        offer_bytes: u64,
        spin_us: u64,
        identity: Option<&Path>,
    ) -> anyhow::Result<Self> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let address = format!("127.0.0.1:{port}");
        let mut command = Command::new(std::env::current_exe()?);
        match identity {
            Some(identity) => command.arg("agent").arg("--identity").arg(identity),
            None => command.args(["agent", "--plaintext"]),
        };
        let child = command
            .args(["--offer", &offer_bytes.to_string(), "--listen", &address])
            .args(["--spin-us", &spin_us.to_string()])
            .arg("--run-dir")
            .arg(dir.join("run"))
            .arg("--memory-dir")
            .arg(dir.join("memory"))
            .env("HECA_LOG", "error")
            .stdin(Stdio::null())
            .spawn()
            .context("start a sponsor")?;
        let sponsor = Self { child, address };
        let deadline = Instant::now() + Duration::from_secs(10);
        while std::net::TcpStream::connect(&sponsor.address).is_err() {
            anyhow::ensure!(Instant::now() < deadline, "the sponsor does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(sponsor)
    }

    /// Processor time that it used, in seconds.
    pub(super) fn cpu_s(&self) -> f64 {
        super::worker::process_cpu_s(self.child.id())
    }
}

impl Drop for BenchSponsor {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.child.wait();
    }
}
