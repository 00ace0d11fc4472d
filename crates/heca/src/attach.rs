//! `heca attach`.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use heca_agent::pager::{self, PagerConfig};
use heca_types::limits::LEASE_MS_DEFAULT;
use heca_types::{Epoch, OwnerId, RegionId};

use crate::cli::AttachArguments;
use crate::output;

/// Counts SIGINT and SIGTERM instead of dying from them: the process would be left standing still.
fn count_signals() -> anyhow::Result<Arc<AtomicUsize>> {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = count.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (ready, is_ready) = std::sync::mpsc::channel();
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            let signals = signal(SignalKind::interrupt())
                .and_then(|interrupt| Ok((interrupt, signal(SignalKind::terminate())?)));
            let Ok((mut interrupt, mut terminate)) = signals else { return };
            let _ = ready.send(());
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                counted.fetch_add(1, Ordering::Relaxed);
            }
        });
    })?;
    is_ready.recv()?;
    Ok(count)
}

pub fn run(arguments: &AttachArguments) -> anyhow::Result<ExitCode> {
    let signals = count_signals()?;
    let config = PagerConfig {
        name: format!("pid-{}", arguments.pid),
        pid: arguments.pid,
        ram_file: std::path::absolute(&arguments.file)?,
        region: RegionId::random(),
        owner: OwnerId::random(),
        epoch: Epoch(1),
        local: arguments.pool.local,
        replicas: arguments.pool.replicas,
        sponsors: arguments.pool.sponsors.clone(),
        eviction: arguments.pool.eviction,
        prefetch: !arguments.pool.no_prefetch,
        lease_ms: LEASE_MS_DEFAULT,
        spin_us: arguments.spin_us,
    };
    if let Err(error) = heca_sys::process::lock_memory() {
        tracing::warn!(%error, "memory is not locked: faults may wait for swap");
    }
    let mut handle = pager::start(&config)?;
    eprintln!("attached to process {}; Ctrl-C brings its memory back and detaches", config.pid);
    let mut seen = 0;
    loop {
        let ended = handle.ended().recv_timeout(Duration::from_secs(1))
            == Err(crossbeam_channel::RecvTimeoutError::Disconnected);
        if ended {
            let stats = handle.finish();
            eprintln!("process {} ended", config.pid);
            return report(arguments, stats.as_ref());
        }
        let count = signals.load(Ordering::Relaxed);
        if count > seen {
            seen = count;
            eprintln!("bringing memory back (Ctrl-C again gives up and goes on paging)");
            let mut last = u64::MAX;
            let outcome = handle.detach(|remote| {
                if remote != last {
                    last = remote;
                    eprintln!("  {remote} pages are remote");
                }
                signals.load(Ordering::Relaxed) == seen
            });
            match outcome {
                Ok(stats) => {
                    eprintln!("detached from process {}", config.pid);
                    return report(arguments, Some(&stats));
                }
                Err((still, problem)) => {
                    eprintln!("not detached: {problem}");
                    seen = signals.load(Ordering::Relaxed);
                    handle = still;
                }
            }
        }
        if arguments.watch
            && let Some(stats) = handle.stats()
        {
            if arguments.json {
                println!("{}", serde_json::to_string(&stats)?);
            } else {
                println!("{}", output::line(&stats));
            }
        }
    }
}

fn report(
    arguments: &AttachArguments,
    stats: Option<&heca_api::PagerStats>,
) -> anyhow::Result<ExitCode> {
    if let Some(stats) = stats {
        if arguments.json {
            println!("{}", serde_json::to_string(stats)?);
        } else {
            output::print_pager(stats);
        }
    }
    Ok(ExitCode::SUCCESS)
}
