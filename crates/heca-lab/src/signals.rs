//! An orderly end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Sets a flag at Ctrl-C or `SIGTERM`, so that a run ends at its next step with everything taken down.
///
/// # Errors
/// Signals that cannot be caught.
pub fn catch_signals(interrupted: &Arc<AtomicBool>) -> anyhow::Result<()> {
    let interrupted = interrupted.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (ready, is_ready) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            let signals = signal(SignalKind::interrupt())
                .and_then(|interrupt| Ok((interrupt, signal(SignalKind::terminate())?)));
            let Ok((mut interrupt, mut terminate)) = signals else { return };
            let _ = ready.send(());
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            eprintln!("interrupted: taking everything down");
            interrupted.store(true, Ordering::Relaxed);
        });
    });
    Ok(is_ready.recv()?)
}
