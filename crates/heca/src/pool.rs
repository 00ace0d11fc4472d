//! `heca pool` and `heca host`.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use heca_agent::agent::socket_path;
use heca_api::{AgentInfo, Client, Drain, Upgrade};
use heca_pki::{EnrolServer, HostIdentity, JoinToken, Pool};

use crate::cli::{HostArguments, HostCommand, PoolCommand, PoolManagement, UpgradeArguments};

pub fn run(arguments: &PoolManagement) -> anyhow::Result<ExitCode> {
    let dir = &arguments.dir;
    match &arguments.command {
        PoolCommand::Init { name } => {
            let pool = Pool::init(dir, name)?;
            println!("pool `{}` ({}) made in {}", pool.name(), pool.id(), dir.display());
            println!("next: `heca pool serve` on this host, then `heca pool token` for each host");
        }
        PoolCommand::Token { address, name, ttl_minutes } => {
            let ttl = Duration::from_secs(ttl_minutes * 60);
            let token = Pool::open(dir)?.token(address, ttl, name.as_deref())?;
            println!("{}", *token.encode());
        }
        PoolCommand::Serve { listen } => {
            Pool::open(dir)?;
            let server = EnrolServer::start(dir, listen)
                .with_context(|| format!("serve enrolment on {listen}"))?;
            println!("enrolment on {}; Ctrl-C ends it", server.local_addr());
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(tokio::signal::ctrl_c())?;
        }
        PoolCommand::Hosts { json } => hosts(&Pool::open(dir)?, *json)?,
        PoolCommand::Revoke { host } => {
            let serials = Pool::open(dir)?.revoke(host)?;
            println!("{host}: {serials} certificates revoked; hosts learn of it within minutes");
        }
        PoolCommand::RotateCa => {
            Pool::open(dir)?.rotate_ca()?;
            println!("a new CA signs from now on; certificates of the old one stay valid");
        }
        PoolCommand::PruneCa => {
            let pruned = Pool::open(dir)?.prune_ca()?;
            println!("{pruned} CAs that no certificate needs any more were removed");
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn hosts(pool: &Pool, json: bool) -> anyhow::Result<()> {
    let records = pool.hosts()?;
    if json {
        println!("{}", serde_json::to_string_pretty(&records)?);
        return Ok(());
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    println!("{:<24} {:<10} expires in", "host", "state");
    for record in records {
        let state = match (record.revoked, record.is_valid(now)) {
            (Some(_), _) => "revoked",
            (None, true) => "valid",
            (None, false) => "expired",
        };
        let days = record.not_after.saturating_sub(now) / 86_400;
        println!("{:<24} {:<10} {days} days", record.name, state);
    }
    Ok(())
}

fn own_name() -> anyhow::Result<String> {
    let name = rustix::system::uname();
    let name = name.nodename().to_str().context("the host's name is not text")?;
    Ok(name.split('.').next().unwrap_or(name).to_lowercase())
}

fn identity(dir: &Path) -> anyhow::Result<HostIdentity> {
    Ok(HostIdentity::load(dir)?)
}

pub async fn host(arguments: HostArguments) -> anyhow::Result<ExitCode> {
    let dir = arguments.identity;
    let client = Client::new(&socket_path(&arguments.run_dir));
    match arguments.command {
        HostCommand::Join { token, name } => {
            let token = JoinToken::parse(token.trim())?;
            let name = name.map_or_else(own_name, Ok)?;
            let joined = tokio::task::spawn_blocking({
                let dir = dir.clone();
                move || heca_pki::join(&token, &name, &dir)
            });
            let host = joined.await??;
            println!("{} is in pool {}", host.name(), host.pool_id());
            println!("its identity is in {}", dir.display());
        }
        HostCommand::Renew => {
            let renewed = tokio::task::spawn_blocking(move || heca_pki::renew(&dir)).await??;
            let days = renewed.expires_in(SystemTime::now()).as_secs() / 86_400;
            println!("{}: certificate renewed, valid for {days} days", renewed.name());
        }
        HostCommand::Show { json } => {
            let info: AgentInfo = client.get("/v1/agent").await?;
            if json {
                println!("{}", serde_json::to_string_pretty(&info)?);
                return Ok(ExitCode::SUCCESS);
            }
            match identity(&dir) {
                Ok(host) => {
                    let days = host.expires_in(SystemTime::now()).as_secs() / 86_400;
                    println!("name      {} (certificate valid for {days} days)", host.name());
                }
                Err(_) => println!("name      none: not in a pool"),
            }
            let sponsor = info.sponsor.as_deref().unwrap_or("no");
            println!("sponsor   {sponsor}, {} on offer", info.offer);
            println!(
                "reserved  {} by {} regions, {} stored",
                info.reserved, info.regions, info.stored
            );
            println!("vms       {}", info.vms);
            if info.draining {
                println!("draining  what it holds moves to other sponsors");
            }
            if info.pressed {
                println!("pressed   short of memory: it gives extents back");
            }
        }
        HostCommand::Drain { off, wait, timeout } => {
            let drain = !off;
            let mut info: AgentInfo = client.post("/v1/drain", &Drain { drain }).await?;
            if off {
                println!("the sponsor takes extents again");
                return Ok(ExitCode::SUCCESS);
            }
            println!("draining: {} stored for {} regions", info.stored, info.regions);
            let deadline = std::time::Instant::now() + Duration::from_secs(timeout);
            let mut stored = info.stored;
            while wait && info.regions > 0 {
                if std::time::Instant::now() > deadline {
                    bail!(
                        "{} regions still hold {} here; their VMs need other sponsors with room \
                         (heca vm add-sponsor)",
                        info.regions,
                        info.stored
                    );
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
                info = client.get("/v1/agent").await?;
                if info.stored != stored {
                    stored = info.stored;
                    println!("  {} stored for {} regions", info.stored, info.regions);
                }
            }
            if wait {
                println!("drained: nothing is stored here any more");
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

pub async fn upgrade(arguments: UpgradeArguments) -> anyhow::Result<ExitCode> {
    let client = Client::new(&socket_path(&arguments.run_dir));
    let program = match arguments.program {
        Some(program) => std::path::absolute(program)?,
        None => std::env::current_exe()?,
    };
    let () = client.post("/v1/upgrade", &Upgrade { program: program.clone() }).await?;
    // The agent becomes the new program after it answered.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let mut info: Result<AgentInfo, _> = client.get("/v1/agent").await;
    for _ in 0..100 {
        if info.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        info = client.get("/v1/agent").await;
    }
    let info = info.context("the agent does not answer after the upgrade")?;
    println!("agent and pagers run {} (version {})", program.display(), info.version);
    Ok(ExitCode::SUCCESS)
}
