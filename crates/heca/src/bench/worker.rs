//! A process that does the work that is measured, on command.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::Context;
use serde::de::DeserializeOwned;

/// A program that says `ready` and then answers each line by one of JSON; ended when dropped.
pub(super) struct Worker {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Worker {
    pub(super) fn start(mut command: Command) -> anyhow::Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start a program of the benchmark")?;
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().context("output is piped")?);
        let mut worker = Self { child, input, output };
        anyhow::ensure!(worker.line()?.trim() == "ready", "a program did not start");
        Ok(worker)
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        anyhow::ensure!(self.output.read_line(&mut line)? > 0, "the program ended");
        Ok(line)
    }

    pub(super) fn ask<T: DeserializeOwned>(&mut self, line: &str) -> anyhow::Result<T> {
        let input = self.input.as_mut().context("input is open")?;
        writeln!(input, "{line}")?;
        input.flush()?;
        Ok(serde_json::from_str(&self.line()?)?)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.input.take();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Processor time of a process, in seconds.
pub(super) fn process_cpu_s(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let Some(end) = stat.rfind(')') else { return 0.0 };
    let fields: Vec<u64> =
        stat[end + 1..].split_whitespace().map(|f| f.parse().unwrap_or(0)).collect();
    // User and system time are fields 14 and 15 of the line.
    let ticks = fields.get(11).unwrap_or(&0) + fields.get(12).unwrap_or(&0);
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}
