//! One host: a network namespace and the agent in it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use heca_api::{AgentInfo, Client, VmInfo};
use rustix::process::{Pid, Signal, kill_process};

/// How an agent is started.
#[derive(Debug, Clone, Default)]
pub struct AgentOptions {
    /// Memory to lend, as on the command line; none if empty.
    pub offer: String,
    /// Directory of its identity in a pool; plaintext without one.
    pub identity: Option<PathBuf>,
    /// Further arguments.
    pub arguments: Vec<String>,
}

/// One host of a lab.
#[derive(Debug)]
pub struct Host {
    namespace: String,
    address: String,
    run_dir: PathBuf,
    memory_dir: PathBuf,
    agent: Option<Child>,
    options: AgentOptions,
}

/// Port that sponsors of a lab listen on.
const PORT: u16 = 7900;

/// The directory that cargo builds into.
///
/// # Errors
/// The program is not run from there.
pub fn target_dir() -> anyhow::Result<PathBuf> {
    let program = std::env::current_exe()?;
    // target/PROFILE/program, or target/PROFILE/deps/test. Cargo tags only a directory that it made.
    program
        .ancestors()
        .find(|dir| [".rustc_info.json", "CACHEDIR.TAG"].iter().any(|f| dir.join(f).exists()))
        .map(Path::to_owned)
        .context("not run from cargo's target directory")
}

/// The `heca` program that belongs to this build: `HECA_BIN`, or the one beside this program.
///
/// # Errors
/// It was not built.
pub fn heca_binary() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os("HECA_BIN") {
        return Ok(path.into());
    }
    let program = std::env::current_exe()?;
    let found =
        program.ancestors().skip(1).take(2).map(|dir| dir.join("heca")).find(|p| p.is_file());
    found.context("no heca program beside this one: run `cargo build` first")
}

impl Host {
    pub(crate) fn new(
        namespace: &str,
        address: &str,
        dir: &Path,
        memory_dir: &Path,
        position: usize,
    ) -> Self {
        Self {
            namespace: namespace.to_owned(),
            address: address.to_owned(),
            run_dir: dir.join(format!("h{position}")),
            memory_dir: memory_dir.join(format!("h{position}")),
            agent: None,
            options: AgentOptions::default(),
        }
    }

    /// Name of its network namespace.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Its address in the lab's network.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Where its sponsor listens.
    #[must_use]
    pub fn sponsor(&self) -> String {
        format!("{}:{PORT}", self.address)
    }

    /// Directory of its agent's socket.
    #[must_use]
    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    /// Directory of guest RAM and of the page store.
    #[must_use]
    pub fn memory_dir(&self) -> &Path {
        &self.memory_dir
    }

    /// Log of its agent.
    #[must_use]
    pub fn agent_log(&self) -> PathBuf {
        self.run_dir.with_extension("log")
    }

    /// Process id of its agent.
    #[must_use]
    pub fn agent_pid(&self) -> Option<i32> {
        self.agent.as_ref().map(|child| child.id() as i32)
    }

    /// A command that runs inside the host's network.
    #[must_use]
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace]).arg(program);
        command.env("HECA_RUN_DIR", &self.run_dir);
        command
    }

    /// Starts its agent and waits until it answers.
    ///
    /// # Errors
    /// An agent that does not start, with the end of its log.
    pub fn start_agent(&mut self, options: &AgentOptions) -> anyhow::Result<()> {
        ensure!(self.agent.is_none(), "the agent runs already");
        self.options = options.clone();
        let log = File::options().create(true).append(true).open(self.agent_log())?;
        let mut command = self.command(&heca_binary()?);
        command.arg("agent").arg("--memory-dir").arg(&self.memory_dir);
        match &options.identity {
            Some(identity) => command.arg("--identity").arg(identity),
            None => command.arg("--plaintext"),
        };
        if !options.offer.is_empty() {
            command.args(["--offer", &options.offer, "--listen", &self.sponsor()]);
        }
        command.args(&options.arguments);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        // `ip netns exec` becomes the program, so the child is the agent itself.
        self.agent = Some(command.spawn().context("start an agent")?);
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.agent_info().is_err() {
            let ended = self.agent.as_mut().and_then(|child| child.try_wait().ok().flatten());
            if ended.is_some() || Instant::now() > deadline {
                self.stop_agent();
                let text = std::fs::read_to_string(self.agent_log()).unwrap_or_default();
                bail!("the agent does not answer: {}", text.trim());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Starts its agent again as it was started last.
    ///
    /// # Errors
    /// Those of [`Self::start_agent`].
    pub fn restart_agent(&mut self) -> anyhow::Result<()> {
        let options = self.options.clone();
        self.start_agent(&options)
    }

    /// Sends its agent a signal.
    ///
    /// # Errors
    /// No agent runs.
    pub fn signal_agent(&self, signal: Signal) -> anyhow::Result<()> {
        let agent = self.agent.as_ref().context("no agent runs")?;
        Ok(kill_process(Pid::from_child(agent), signal)?)
    }

    /// Ends its agent in an orderly way, and its VMs with it.
    pub fn stop_agent(&mut self) {
        let Some(mut child) = self.agent.take() else { return };
        let _ = kill_process(Pid::from_child(&child), Signal::TERM);
        // It may stand still.
        let _ = kill_process(Pid::from_child(&child), Signal::CONT);
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            if matches!(child.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = child.kill();
        let _ = child.wait();
    }

    /// Kills its agent (SIGKILL).
    pub fn kill_agent(&mut self) {
        if let Some(mut child) = self.agent.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Runs `heca` with arguments and returns what it said.
    ///
    /// # Errors
    /// A program that cannot be started; its failure is in the output.
    pub fn heca(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        Ok(self.command(&heca_binary()?).args(arguments).stdin(Stdio::null()).output()?)
    }

    /// Runs `heca` with arguments and returns its standard output.
    ///
    /// # Errors
    /// A command that fails, with its words.
    pub fn heca_ok(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = self.heca(arguments)?;
        ensure!(
            output.status.success(),
            "heca {}: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(String::from_utf8(output.stdout)?)
    }

    fn get<T: serde::de::DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        let client = Client::new(&self.run_dir.join("agent.sock"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(runtime.block_on(client.get(path))?)
    }

    /// What its agent tells about itself.
    ///
    /// # Errors
    /// An agent that does not answer.
    pub fn agent_info(&self) -> anyhow::Result<AgentInfo> {
        self.get("/v1/agent")
    }

    /// What its agent tells about a VM.
    ///
    /// # Errors
    /// An agent that does not answer, a VM that it does not know.
    pub fn vm(&self, name: &str) -> anyhow::Result<VmInfo> {
        self.get(&format!("/v1/vms/{name}"))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.stop_agent();
    }
}
