//! Hosts that VMs move between, and the guest that such moves are measured with.

use std::path::Path;
use std::time::Duration;

use heca_api::MIGRATION_PORT;
use heca_types::ByteSize;

use crate::appmembench::Appmembench;
use crate::guest::find_kernel;
use crate::heartbeat::Heartbeat;
use crate::host::AgentOptions;
use crate::net::Lab;
use crate::pool::LabPool;

/// Longest time for a guest to start.
const START: Duration = Duration::from_secs(180);

/// Starts the agents of a lab's hosts: 1 and 2 run VMs and take them in, the others up to `hosts` lend
/// `offer` of memory each. With a pool they have identities, else they speak plaintext.
///
/// # Errors
/// An agent that does not start.
pub fn start_moving_hosts(
    lab: &mut Lab,
    hosts: usize,
    offer: ByteSize,
    pool: Option<&LabPool>,
) -> anyhow::Result<()> {
    for number in 1..=hosts {
        let mut options = AgentOptions {
            identity: pool.map(|pool| pool.identity(number)),
            ..AgentOptions::default()
        };
        if number > 2 {
            options.offer = offer.0.to_string();
        } else {
            let address = format!("{}:{MIGRATION_PORT}", lab.host(number).address());
            options.arguments = vec!["--migration-listen".to_owned(), address];
        }
        lab.host(number).start_agent(&options)?;
    }
    Ok(())
}

/// A guest that beats and runs `appmembench`.
#[derive(Debug, Clone, Copy)]
pub struct MeasuredGuest<'a> {
    /// Of the VM.
    pub name: &'a str,
    /// Memory of the guest.
    pub memory: ByteSize,
    /// The most of it that stays on its host.
    pub local: ByteSize,
    /// Hosts that lend it the rest; two replicas where there are two of them.
    pub sponsors: &'a [usize],
    /// Pages are sealed before they leave the host.
    pub encrypt: bool,
    /// The system's QEMU if there is none.
    pub qemu: Option<&'a Path>,
    /// An image of [`Appmembench::write_image`].
    pub initrd: &'a Path,
}

impl MeasuredGuest<'_> {
    /// Starts it on a host, and waits until it takes orders.
    ///
    /// # Errors
    /// No kernel, what `heca vm run` says, a guest that stays silent.
    pub fn start(
        &self,
        lab: &mut Lab,
        host: usize,
        heartbeat: &Heartbeat,
        appmembench: &Appmembench,
    ) -> anyhow::Result<()> {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let (kernel, initrd) = (text(&find_kernel()?), text(self.initrd));
        let (memory, local) = (self.memory.0.to_string(), self.local.0.to_string());
        let replicas = self.sponsors.len().min(2).to_string();
        let sponsors: Vec<_> = self.sponsors.iter().map(|&host| lab.host(host).sponsor()).collect();
        let qemu = self.qemu.map(std::path::absolute).transpose()?.as_deref().map(text);
        let further = [heartbeat.qemu_arguments(), appmembench.qemu_arguments()].concat();
        let mut words = vec!["vm", "run", self.name, "--memory", &memory, "--local", &local];
        words.extend(["--replicas", &replicas]);
        for sponsor in &sponsors {
            words.extend(["--sponsor", sponsor]);
        }
        if self.encrypt {
            words.push("--encrypt");
        }
        if let Some(qemu) = &qemu {
            words.extend(["--qemu", qemu]);
        }
        words.extend(["--kernel", &kernel, "--initrd", &initrd, "--append"]);
        words.push("console=ttyS0 quiet panic=-1 rcupdate.rcu_cpu_stall_suppress=1");
        words.push("--");
        words.extend(further.iter().map(String::as_str));
        lab.host(host).heca_ok(&words)?;
        appmembench.wait_up(START)
    }
}
