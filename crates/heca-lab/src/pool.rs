//! A pool for a lab's hosts: its CA, the enrolment service in the first host's network, identities.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::host::heca_binary;
use crate::net::Lab;

const ENROL_PORT: u16 = 7901;

/// A pool that all hosts of a lab are members of. Its enrolment service ends when dropped.
#[derive(Debug)]
pub struct LabPool {
    server: Child,
    identities: Vec<PathBuf>,
}

fn heca(arguments: &mut Command) -> anyhow::Result<String> {
    let output = arguments.stdin(Stdio::null()).output()?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        bail!("{:?}: {words}", arguments.get_args());
    }
    Ok(String::from_utf8(output.stdout)?)
}

impl LabPool {
    /// Makes a pool and has `hosts` hosts join it, each with a token of its own.
    ///
    /// # Errors
    /// Those of `heca pool` and `heca host join`.
    pub fn new(lab: &mut Lab, hosts: usize) -> anyhow::Result<Self> {
        let program = heca_binary()?;
        let dir = lab.dir().join("pool");
        let mut init = Command::new(&program);
        heca(init.args(["pool", "init", "lab", "--dir"]).arg(&dir))?;
        let address = format!("{}:{ENROL_PORT}", lab.host(1).address());
        let log = File::create(lab.dir().join("enrol.log"))?;
        let mut serve = lab.host(1).command(&program);
        serve.args(["pool", "serve", "--listen", &address, "--dir"]).arg(&dir);
        serve.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let server = serve.spawn().context("serve enrolment")?;
        let mut pool = Self { server, identities: Vec::new() };
        for number in 1..=hosts {
            let identity = lab.dir().join(format!("identity{number}"));
            let mut token = Command::new(&program);
            token.args(["pool", "token", "--address", &address, "--dir"]).arg(&dir);
            let token = heca(&mut token)?;
            let deadline = Instant::now() + Duration::from_secs(10);
            loop {
                let mut join = lab.host(number).command(&program);
                join.args(["host", "join", token.trim(), "--name", &format!("h{number}")]);
                match heca(join.arg("--identity").arg(&identity)) {
                    Ok(_) => break,
                    // The service may not listen yet.
                    Err(error) if Instant::now() > deadline => return Err(error),
                    Err(_) => std::thread::sleep(Duration::from_millis(100)),
                }
            }
            pool.identities.push(identity);
        }
        Ok(pool)
    }

    /// Directory of a host's identity, counted as in the lab.
    #[must_use]
    pub fn identity(&self, number: usize) -> PathBuf {
        self.identities[number - 1].clone()
    }
}

impl Drop for LabPool {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}
