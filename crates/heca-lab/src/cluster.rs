//! A guest under load on pooled memory: host 1 runs it, the others sponsor it.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use heca_api::{PagerStats, VmInfo, VmState};
use heca_types::ByteSize;

use crate::console::Console;
use crate::guest::{GuestImage, find_kernel};
use crate::host::{AgentOptions, Host, heca_binary};
use crate::net::Lab;
use crate::pool::LabPool;

/// Name of the VM.
const VM: &str = "guest";
/// Time between two looks at the guest and at its pager.
const LOOK: Duration = Duration::from_millis(50);

/// How a cluster is made.
#[derive(Debug, Clone)]
pub struct ClusterOptions {
    /// Hosts that lend memory.
    pub sponsors: usize,
    /// TLS between the hosts, and sealed pages.
    pub secure: bool,
    /// Guest RAM.
    pub memory: ByteSize,
    /// Part of it that may be on host 1 at a time.
    pub local: ByteSize,
    /// Memory that the guest works on.
    pub working_set: ByteSize,
    /// Guest processors.
    pub vcpus: u32,
    /// Further arguments of every agent.
    pub agent_arguments: Vec<String>,
}

impl Default for ClusterOptions {
    fn default() -> Self {
        let mib = |n: u64| ByteSize(n << 20);
        Self {
            sponsors: 4,
            secure: true,
            memory: mib(256),
            local: mib(96),
            working_set: mib(150),
            vcpus: 2,
            agent_arguments: vec!["--rebuild-after-ms".to_owned(), "1500".to_owned()],
        }
    }
}

/// What was seen of the VM at a moment.
#[derive(Debug, Clone)]
pub struct Look {
    /// The VM, as its agent tells.
    pub vm: VmInfo,
    /// Figures of its pager.
    pub pager: PagerStats,
}

impl Look {
    /// Whether everything is as it should be: the guest is served, every sponsor is up, every
    /// extent has all its replicas, and nothing is on its way elsewhere.
    #[must_use]
    pub fn is_healthy(&self) -> bool {
        let gauges = &self.pager.gauges;
        self.vm.state == VmState::Running
            && self.pager.sponsors.iter().all(|sponsor| sponsor.up && !sponsor.leaving)
            && gauges.degraded_extents == 0
            && gauges.leaving_extents == 0
            && gauges.blocked_faults == 0
    }
}

/// A lab with a pool, a VM that works on its memory without end, and sponsors.
#[derive(Debug)]
pub struct Cluster {
    console: Console,
    qemu_pid: i32,
    pagers: Vec<PagerStats>,
    last_pager: Option<(i32, PagerStats)>,
    pool: Option<LabPool>,
    /// The hosts. After the rest, so that it goes last.
    pub lab: Lab,
    options: ClusterOptions,
}

impl Cluster {
    /// Starts everything and waits until the guest works and part of its memory is remote.
    ///
    /// # Errors
    /// Whatever does not start.
    pub fn start(options: &ClusterOptions) -> anyhow::Result<Self> {
        let mut lab = Lab::new(options.sponsors + 1)?;
        let hosts = options.sponsors + 1;
        let pool = options.secure.then(|| LabPool::new(&mut lab, hosts)).transpose()?;
        for number in 1..=hosts {
            let sponsors = number > 1;
            if sponsors {
                // Room for each extent of the guest once, and a little.
                lab.limit_memory(number, options.memory.0 + (24 << 20))?;
            }
            let agent = AgentOptions {
                offer: if sponsors { (options.memory.0 * 2).to_string() } else { String::new() },
                identity: pool.as_ref().map(|pool| pool.identity(number)),
                arguments: options.agent_arguments.clone(),
            };
            lab.host(number).start_agent(&agent)?;
        }
        let initrd = lab.dir().join("initrd");
        let mut image = GuestImage::new()?;
        image.stripped_program("heca", &heca_binary()?, lab.dir())?;
        let init = format!(
            "echo guest: up\n/bin/heca hammer --size {} --threads 2\necho guest: hammer ended\n\
             while :; do sleep 1; done\n",
            options.working_set.0
        );
        image.write(&init, &initrd)?;
        let vm = start_vm(&mut lab, options, &initrd)?;
        let mut cluster = Self {
            console: Console::new(&vm.console_log),
            qemu_pid: vm.qemu_pid.context("QEMU has no process")?,
            pagers: Vec::new(),
            last_pager: None,
            pool,
            lab,
            options: options.clone(),
        };
        let deadline = Instant::now() + Duration::from_secs(120);
        loop {
            let remote = cluster.look()?.is_some_and(|look| look.pager.gauges.remote_pages > 4096);
            if remote && cluster.console.samples().len() > 2 {
                return Ok(cluster);
            }
            ensure!(Instant::now() < deadline, "the guest does not work after two minutes");
            std::thread::sleep(LOOK);
        }
    }

    /// Host 1, which runs the VM.
    pub fn demander(&mut self) -> &mut Host {
        self.lab.host(1)
    }

    /// What the guest said.
    #[must_use]
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// Numbers of the sponsors' hosts.
    #[must_use]
    pub fn sponsors(&self) -> std::ops::RangeInclusive<usize> {
        2..=self.options.sponsors + 1
    }

    /// How it was made.
    #[must_use]
    pub fn options(&self) -> &ClusterOptions {
        &self.options
    }

    /// Directory of a host's identity in the pool.
    #[must_use]
    pub fn identity(&self, number: usize) -> Option<PathBuf> {
        self.pool.as_ref().map(|pool| pool.identity(number))
    }

    /// Last figures of the pagers so far, the present one's at the end.
    pub fn pagers(&self) -> impl Iterator<Item = &PagerStats> {
        self.pagers.iter().chain(self.last_pager.as_ref().map(|(_, stats)| stats))
    }

    /// Asks for the VM and reads the console. Without an agent or a pager there is nothing to see.
    ///
    /// # Errors
    /// The guest read wrong bytes, is in trouble, or QEMU ended.
    pub fn look(&mut self) -> anyhow::Result<Option<Look>> {
        self.check_guest()?;
        let Ok(vm) = self.lab.host(1).vm(VM) else { return Ok(None) };
        ensure!(
            vm.qemu_pid == Some(self.qemu_pid) && vm.state != VmState::Stopped,
            "QEMU ended: {:?}",
            vm.problem
        );
        // In other states the figures are those of a pager that ended.
        let served = vm.state == VmState::Running;
        let (Some(pager), Some(pid), true) = (vm.pager.clone(), vm.pager_pid, served) else {
            return Ok(None);
        };
        match &mut self.last_pager {
            Some((known, stats)) if *known == pid => *stats = pager.clone(),
            other => self.pagers.extend(other.replace((pid, pager.clone())).map(|(_, s)| s)),
        }
        Ok(Some(Look { vm, pager }))
    }

    /// Reads the console.
    ///
    /// # Errors
    /// The guest read wrong bytes, is in trouble, or QEMU ended.
    pub fn check_guest(&mut self) -> anyhow::Result<()> {
        self.console.poll();
        if !self.console.complaints().is_empty() {
            bail!("the guest is in trouble: {}", self.console.complaints().join("; "));
        }
        let wrong = self.console.last().map_or(0, |sample| sample.wrong_bytes);
        ensure!(wrong == 0, "the guest read {wrong} wrong bytes");
        ensure!(self.qemu_lives(), "QEMU ended");
        Ok(())
    }

    /// Whether the guest's QEMU, the one that was started first, is there.
    #[must_use]
    pub fn qemu_lives(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.qemu_pid));
        stat.is_ok_and(|stat| !stat[stat.rfind(')').unwrap_or(0)..].starts_with(") Z"))
    }

    /// Lets time pass, with an eye on the guest.
    ///
    /// # Errors
    /// See [`Self::check_guest`].
    pub fn pass(&mut self, time: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + time;
        loop {
            self.check_guest()?;
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(LOOK));
        }
    }

    /// Waits until what is seen is as wanted.
    ///
    /// # Errors
    /// It does not come to that in time; see also [`Self::check_guest`].
    pub fn wait(
        &mut self,
        what: &str,
        bound: Duration,
        done: impl Fn(&Look) -> bool,
    ) -> anyhow::Result<Look> {
        let deadline = Instant::now() + bound;
        let mut last = None;
        loop {
            let look = self.look()?;
            if let Some(look) = look.as_ref().filter(|look| done(look)) {
                return Ok(look.clone());
            }
            last = look.or(last);
            if Instant::now() > deadline {
                bail!("no {what} after {} s: {}", bound.as_secs(), self.describe(last.as_ref()));
            }
            std::thread::sleep(LOOK);
        }
    }

    fn describe(&mut self, look: Option<&Look>) -> String {
        let Some(look) = look else {
            return format!("the VM is not served: {:?}", self.lab.host(1).vm(VM));
        };
        let sponsors = look.pager.sponsors.iter().map(|sponsor| {
            let Some(reason) = &sponsor.down_reason else { return sponsor.address.clone() };
            format!("{} ({reason})", sponsor.address)
        });
        let sponsors: Vec<String> = sponsors.collect();
        format!("{:?}, {:?}, {:?}", look.vm.problem, look.pager.gauges, sponsors)
    }

    /// Waits until everything is as it should be, and goes on verifying memory.
    ///
    /// # Errors
    /// It does not come to that in time; see also [`Self::check_guest`].
    pub fn wait_healthy(&mut self, bound: Duration) -> anyhow::Result<Look> {
        let deadline = Instant::now() + bound;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            self.wait("health", left, Look::is_healthy)?;
            // A loss that nobody noticed yet looks healthy, too.
            std::thread::sleep(LOOK * 2);
            if let Some(look) = self.look()?.filter(Look::is_healthy) {
                return Ok(look);
            }
        }
    }

    /// Waits for reports of a guest that went on, and returns how many there were before.
    ///
    /// # Errors
    /// The guest stands still; see also [`Self::check_guest`].
    pub fn wait_for_progress(&mut self, bound: Duration) -> anyhow::Result<usize> {
        self.console.poll();
        let count = self.console.samples().len();
        let verified = self.console.last().map_or(0, |sample| sample.verified_bytes);
        let deadline = Instant::now() + bound;
        loop {
            self.check_guest()?;
            let went_on = self.console.last().is_some_and(|s| s.verified_bytes > verified);
            if went_on && self.console.samples().len() > count + 1 {
                return Ok(count);
            }
            ensure!(
                Instant::now() < deadline,
                "the guest does not go on, after {} s",
                bound.as_secs()
            );
            std::thread::sleep(LOOK);
        }
    }

    /// Whether the guest goes on, right or wrong, and reads the console meanwhile.
    pub fn goes_on(&mut self, bound: Duration) -> bool {
        self.console.poll();
        let verified = self.console.last().map_or(0, |sample| sample.verified_bytes);
        let deadline = Instant::now() + bound;
        while Instant::now() < deadline && self.qemu_lives() {
            self.console.poll();
            if self.console.last().is_some_and(|sample| sample.verified_bytes > verified) {
                return true;
            }
            std::thread::sleep(LOOK);
        }
        false
    }

    /// Sends SIGKILL to the pager of the VM.
    ///
    /// # Errors
    /// There is none.
    pub fn kill_pager(&mut self) -> anyhow::Result<()> {
        let pid = self.pager_pid()?;
        let pid = rustix::process::Pid::from_raw(pid).context("no process")?;
        Ok(rustix::process::kill_process(pid, rustix::process::Signal::KILL)?)
    }

    /// Process id of the pager.
    ///
    /// # Errors
    /// There is none.
    pub fn pager_pid(&mut self) -> anyhow::Result<i32> {
        self.lab.host(1).vm(VM)?.pager_pid.context("the VM has no pager")
    }

    /// Changes the local budget.
    ///
    /// # Errors
    /// Those of `heca vm resize`.
    pub fn resize(&mut self, local: ByteSize) -> anyhow::Result<()> {
        self.lab.host(1).heca_ok(&["vm", "resize", VM, "--local", &local.0.to_string()])?;
        Ok(())
    }

    /// Ends the VM in an orderly way.
    ///
    /// # Errors
    /// Those of `heca vm stop`.
    pub fn stop(&mut self) -> anyhow::Result<()> {
        self.lab.host(1).heca_ok(&["vm", "stop", VM, "--now"])?;
        Ok(())
    }
}

fn start_vm(
    lab: &mut Lab,
    options: &ClusterOptions,
    initrd: &std::path::Path,
) -> anyhow::Result<VmInfo> {
    let mut arguments: Vec<String> = ["vm", "run", VM, "--replicas", "2"].map(String::from).into();
    let mut option = |name: &str, value: &str| {
        arguments.extend([name.to_owned(), value.to_owned()]);
    };
    option("--memory", &options.memory.0.to_string());
    option("--local", &options.local.0.to_string());
    option("--vcpus", &options.vcpus.to_string());
    option("--kernel", &find_kernel()?.to_string_lossy());
    option("--initrd", &initrd.to_string_lossy());
    option("--append", "console=ttyS0 quiet panic=-1 rcupdate.rcu_cpu_stall_suppress=1");
    for number in 2..=options.sponsors + 1 {
        option("--sponsor", &lab.host(number).sponsor());
    }
    if options.secure {
        arguments.push("--encrypt".to_owned());
    }
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    lab.host(1).heca_ok(&arguments)?;
    lab.host(1).vm(VM)
}
