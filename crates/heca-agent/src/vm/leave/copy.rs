//! Pages are copied while the guest runs.

use std::time::{Duration, Instant};

use heca_api::{ExportInfo, ExportStage, Flush, Look, MigrationMode, MigrationPhase, Written};
use heca_types::limits::PAGE_BYTES;

use super::*;

/// Passes of a hybrid migration after the first one, and of a pre-copy.
const ROUNDS_HYBRID: u32 = 3;
const ROUNDS_PRECOPY: u32 = 30;
/// Longest time that passes after the first one may take; then the switch comes as it is.
const ROUNDS_TIME: Duration = Duration::from_secs(60);
/// A pass that leaves more than this part of the one before is not worth another one.
const SHRINKS: f64 = 0.75;
/// Part of the downtime that is left to pages; the rest is QEMU's.
const PAGES_SHARE: f64 = 0.25;
/// Looks that tell which pages are written all the time, and the time between them.
const SAMPLES: u32 = 4;
const SAMPLE_TIME: Duration = Duration::from_millis(20);
/// Pages that a safe migration may leave for the time that the guest stands still.
const UNFLUSHED_FEW: u64 = 256;

impl Leave {
    pub(super) fn copy(&self, prepared: &Prepared) -> Result<(), ApiError> {
        self.check()?;
        self.enter(MigrationPhase::Copying);
        let Some(address) = &prepared.pager else { return Ok(()) };
        let request = ExportRequest {
            address: address.clone(),
            ticket: prepared.ticket,
            epoch: lock(&self.epoch).unwrap_or(Epoch(0)),
            bytes_per_s: self.request.bandwidth.map(|size| size.0),
        };
        let request = serde_json::to_value(request).expect("plain data");
        self.pager::<()>("/v1/export", Some(&request))?;
        let stats: heca_api::PagerStats = self.pager("/v1/stats", None)?;
        lock(&self.info).resident_bytes = stats.gauges.local_pages * PAGE_BYTES as u64;
        if self.request.safe {
            return self.flush();
        }
        if stats.eviction == "write-protect" {
            // The kernel has no way to tell of writes that leaves those of eviction alone.
            if self.request.mode == MigrationMode::Precopy {
                let text = "this VM's pager cannot tell which pages are written";
                return Err(ApiError::new("no-tracking", text)
                    .hint("use --mode hybrid, which sends all pages after the switch here"));
            }
            return Ok(());
        }
        if self.request.mode == MigrationMode::Postcopy {
            self.look(false)?;
        } else {
            self.rounds()?;
        }
        self.sample()
    }

    fn look(&self, send: bool) -> Result<u64, ApiError> {
        self.check()?;
        let look = serde_json::to_value(Look { send }).expect("plain data");
        Ok(self.pager::<Written>("/v1/export/look", Some(&look))?.pages)
    }

    /// Waits until all that was queued is sent.
    fn drain(&self) -> Result<(), ApiError> {
        loop {
            self.check()?;
            let export: ExportInfo = self.pager("/v1/export", None)?;
            self.note(&export);
            if export.stage == ExportStage::Failed {
                let reason = export.reason.unwrap_or_default();
                return Err(
                    ApiError::new("copy-failed", "the memory cannot be sent").detail(reason)
                );
            }
            if export.queued_pages == 0 {
                return Ok(());
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Passes over what was written meanwhile, until the rest is small or does not get smaller.
    fn rounds(&self) -> Result<(), ApiError> {
        let precopy = self.request.mode == MigrationMode::Precopy;
        let most = if precopy { ROUNDS_PRECOPY } else { ROUNDS_HYBRID };
        let budget = self.request.max_downtime_ms as f64 / 1e3 * PAGES_SHARE;
        let begun = Instant::now();
        let mut before = u64::MAX;
        for round in 0..=most {
            let sent_before = lock(&self.info).report.pages_sent;
            let pass = Instant::now();
            let written = self.look(true)?;
            self.drain()?;
            lock(&self.info).report.rounds = round + 1;
            let sent = lock(&self.info).report.pages_sent - sent_before;
            let rate = sent as f64 / pass.elapsed().as_secs_f64().max(1e-3);
            if round == 0 {
                continue;
            }
            // What is written in the time of this pass is what the next one would have.
            let fits = (written as f64) < rate * budget;
            let shrinks = (written as f64) < before as f64 * SHRINKS;
            if fits || (!shrinks && !precopy) || begun.elapsed() > ROUNDS_TIME {
                return Ok(());
            }
            before = written;
        }
        Ok(())
    }

    /// Learns which pages are written all the time, and sends them once more if they are few.
    fn sample(&self) -> Result<(), ApiError> {
        let postcopy = self.request.mode == MigrationMode::Postcopy;
        let few = self.request.max_downtime_ms * 40;
        let mut send = false;
        for _ in 0..SAMPLES {
            std::thread::sleep(SAMPLE_TIME);
            let written = self.look(send)?;
            send = !postcopy && written < few;
        }
        if send { self.drain() } else { Ok(()) }
    }

    /// Everything that is local goes to the sponsors, and stays here, too.
    fn flush(&self) -> Result<(), ApiError> {
        let on = serde_json::to_value(Flush { on: true }).expect("plain data");
        self.pager::<()>("/v1/flush", Some(&on))?;
        let begun = Instant::now();
        let (mut least, mut since) = (u64::MAX, Instant::now());
        loop {
            self.check()?;
            let (left, degraded) = self.unflushed()?;
            if left < least {
                (least, since) = (left, Instant::now());
            }
            let stuck = since.elapsed() > Duration::from_secs(1);
            if degraded > 0 && stuck {
                let text = format!("{degraded} parts of the memory have too few replicas now");
                return Err(ApiError::new("degraded", text)
                    .hint("--safe waits for redundancy: see `heca vm show`"));
            }
            if degraded > 0 {
                std::thread::sleep(LOOK);
                continue;
            }
            if left < UNFLUSHED_FEW || stuck || begun.elapsed() > ROUNDS_TIME {
                return Ok(());
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Pages that are not known to be on sponsors as they are.
    /// The second figure is of extents that lack a replica.
    pub(super) fn unflushed(&self) -> Result<(u64, u64), ApiError> {
        let stats: heca_api::PagerStats = self.pager("/v1/stats", None)?;
        let left = stats.gauges.resident_pages;
        lock(&self.info).remaining_bytes = left * PAGE_BYTES as u64;
        Ok((left, stats.gauges.degraded_extents))
    }
}
