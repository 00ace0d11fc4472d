//! `heca attach`.

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use heca_agent::pager::{self, PagerConfig};
use heca_api::LocalChoice;

use crate::cli::AttachArguments;
use crate::output;

/// Tells the person at the terminal, if there still is one.
macro_rules! say {
    ($($words:tt)*) => {{ let _ = writeln!(std::io::stderr(), $($words)*); }};
}

/// Counts the signals that end a process instead of dying from them: the attached process would be
/// left standing still.
fn count_signals() -> anyhow::Result<Arc<AtomicUsize>> {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = count.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (ready, is_ready) = std::sync::mpsc::channel();
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            let take = || {
                Ok::<_, std::io::Error>((
                    signal(SignalKind::interrupt())?,
                    signal(SignalKind::terminate())?,
                    signal(SignalKind::hangup())?,
                    signal(SignalKind::quit())?,
                ))
            };
            let Ok((mut interrupt, mut terminate, mut hangup, mut quit)) = take() else { return };
            let _ = ready.send(());
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                    _ = hangup.recv() => {}
                    _ = quit.recv() => {}
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
    let pool = &arguments.pool;
    let file = std::path::absolute(&arguments.file)?;
    let LocalChoice::Fixed(local) = pool.local else {
        anyhow::bail!("only VMs have automatic budgets: give --local a size");
    };
    let config = PagerConfig {
        replicas: pool.replicas,
        eviction: pool.eviction,
        prefetch: !pool.no_prefetch,
        spin_us: arguments.spin_us,
        identity: arguments.security.identity()?,
        ..PagerConfig::new(arguments.pid, file, local, pool.sponsors.clone())
    };
    pager::protect_process();
    let mut handle = pager::start(&config)?;
    say!("attached to process {}; Ctrl-C brings its memory back and detaches", config.pid);
    let mut seen = 0;
    loop {
        let ended = handle.ended().recv_timeout(Duration::from_secs(1))
            == Err(crossbeam_channel::RecvTimeoutError::Disconnected);
        if ended {
            let stats = handle.finish();
            say!("process {} ended", config.pid);
            return report(arguments, stats.as_ref());
        }
        let count = signals.load(Ordering::Relaxed);
        if count > seen {
            seen = count;
            say!("bringing memory back (Ctrl-C again gives up and goes on paging)");
            let mut last = u64::MAX;
            let outcome = handle.detach(|remote| {
                if remote != last {
                    last = remote;
                    say!("  {remote} pages are remote");
                }
                signals.load(Ordering::Relaxed) == seen
            });
            match outcome {
                Ok(stats) => {
                    say!("detached from process {}", config.pid);
                    return report(arguments, stats.as_ref());
                }
                Err(returned) => {
                    let (still, problem) = *returned;
                    say!("not detached: {problem}");
                    seen = signals.load(Ordering::Relaxed);
                    handle = still;
                }
            }
        }
        if arguments.watch
            && let Some(stats) = handle.stats()
        {
            let line =
                if arguments.json { serde_json::to_string(&stats)? } else { output::line(&stats) };
            // Whoever read it may have gone; the process still needs its pager.
            let _ = writeln!(std::io::stdout(), "{line}");
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
