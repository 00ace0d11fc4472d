//! Prometheus text format.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::Ordering;

use heca_api::{PagerStats, Quantiles, VmInfo};
use heca_types::limits::PAGE_BYTES;

use crate::sponsor::SponsorServer;

/// Collects samples; samples of one name come out together, as the format demands.
#[derive(Debug, Default)]
pub struct Text {
    families: BTreeMap<&'static str, (&'static str, &'static str, String)>,
}

fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

impl Text {
    fn add(
        &mut self,
        name: &'static str,
        (kind, help): (&'static str, &'static str),
        labels: &[(&str, &str)],
        value: f64,
    ) {
        self.add_suffixed(name, "", (kind, help), labels, value);
    }

    fn add_suffixed(
        &mut self,
        name: &'static str,
        suffix: &str,
        (kind, help): (&'static str, &'static str),
        labels: &[(&str, &str)],
        value: f64,
    ) {
        let (_, _, lines) =
            self.families.entry(name).or_insert_with(|| (kind, help, String::new()));
        let labels: Vec<String> =
            labels.iter().map(|(key, value)| format!("{key}=\"{}\"", escape(value))).collect();
        let braces =
            if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        writeln!(lines, "{name}{suffix}{braces} {value}").expect("writing to a string");
    }

    /// Adds the figures of a pager.
    pub fn pager(&mut self, stats: &PagerStats) {
        let domain = ("domain", stats.name.as_str());
        let bytes = |pages: u64| (pages * PAGE_BYTES as u64) as f64;
        let gauges = &stats.gauges;
        for (tier, pages) in [
            ("resident", gauges.resident_pages),
            ("standby", gauges.standby_pages),
            ("remote", gauges.remote_pages),
            ("untouched", gauges.untouched_pages),
        ] {
            let about = ("gauge", "Guest memory by where it is.");
            self.add("heca_vm_memory_bytes", about, &[domain, ("tier", tier)], bytes(pages));
        }
        if let Some(pages) = stats.dirty_pages {
            let about = ("gauge", "Guest memory that was written since it was last stored.");
            self.add("heca_vm_dirty_bytes", about, &[domain], bytes(pages));
        }
        let about = ("gauge", "Local memory that the guest may use.");
        self.add("heca_vm_local_budget_bytes", about, &[domain], bytes(gauges.budget_pages));
        let about = ("gauge", "Faults that wait for local memory or a sponsor.");
        for (cause, count) in [("frame", gauges.stalled_faults), ("sponsor", gauges.blocked_faults)]
        {
            self.add("heca_waiting_faults", about, &[domain, ("cause", cause)], count as f64);
        }
        let about = ("gauge", "Pages whose content is lost.");
        self.add("heca_poisoned_pages", about, &[domain], gauges.poisoned_pages as f64);
        let about = ("gauge", "Extents that lack a replica.");
        self.add("heca_degraded_extents", about, &[domain], gauges.degraded_extents as f64);
        let about = ("gauge", "Extents with a replica on a sponsor that wants to be rid of it.");
        self.add("heca_leaving_extents", about, &[domain], gauges.leaving_extents as f64);
        let about = ("gauge", "Whether the VM's memory has a newer owner.");
        let fenced = f64::from(u8::from(stats.fenced.is_some()));
        self.add("heca_fenced", about, &[domain], fenced);
        self.pager_counters(stats, domain);
        self.pager_latency(stats, domain);
        for sponsor in &stats.sponsors {
            let labels = [domain, ("sponsor", sponsor.address.as_str())];
            let about = ("gauge", "Whether the pager can reach the sponsor.");
            self.add("heca_sponsor_up", about, &labels, f64::from(u8::from(sponsor.up)));
            for (direction, count) in [("in", sponsor.bytes_received), ("out", sponsor.bytes_sent)]
            {
                let labels = [labels[0], labels[1], ("direction", direction)];
                let about = ("counter", "Bytes on the wire between pager and sponsor.");
                self.add("heca_wire_bytes_total", about, &labels, count as f64);
            }
        }
    }

    /// Adds what the agent knows of a VM.
    pub fn vm(&mut self, info: &VmInfo) {
        let domain = ("domain", info.name.as_str());
        let about = ("counter", "Times that the VM's pager had to be started again.");
        self.add("heca_pager_restarts_total", about, &[domain], info.pager_restarts as f64);
        if let Some(pause) = info.pager_pause_ms {
            let about = ("gauge", "Time without a pager at the last restart.");
            self.add("heca_pager_pause_seconds", about, &[domain], pause / 1e3);
        }
    }

    fn pager_counters(&mut self, stats: &PagerStats, domain: (&str, &str)) {
        let counters = &stats.counters;
        let about = ("counter", "Time in which some thread of the guest waited for a page.");
        self.add("heca_vm_stall_seconds_total", about, &[domain], stats.stall_s);
        for (kind, count) in [
            ("missing", counters.faults_missing),
            ("minor", counters.faults_minor),
            ("write-protect", counters.faults_write_protect),
        ] {
            let about = ("counter", "Page faults seen by the pager.");
            self.add("heca_faults_total", about, &[domain, ("kind", kind)], count as f64);
        }
        for (class, count) in
            [("demand", counters.demand_fetches), ("prefetch", counters.prefetches)]
        {
            let about = ("counter", "Pages fetched from sponsors.");
            self.add("heca_fetched_pages_total", about, &[domain, ("class", class)], count as f64);
        }
        for (kind, count) in [
            ("clean", counters.evicted_clean_pages),
            ("dirty", counters.evicted_dirty_pages),
            ("zero", counters.evicted_zero_pages),
        ] {
            let about = ("counter", "Pages taken out of use.");
            self.add("heca_evicted_pages_total", about, &[domain, ("kind", kind)], count as f64);
        }
        let about = ("counter", "Reads that were asked of a second replica.");
        self.add("heca_hedged_reads_total", about, &[domain], counters.hedged_fetches as f64);
        let about = ("counter", "Pages copied between sponsors to regain redundancy.");
        self.add("heca_rebuilt_pages_total", about, &[domain], counters.rebuilt_pages as f64);
        let about = ("counter", "Pages that came back altered.");
        self.add("heca_corrupt_replies_total", about, &[domain], counters.corrupt_replies as f64);
        let about = ("counter", "Processor time used by the pager.");
        self.add("heca_pager_cpu_seconds_total", about, &[domain], stats.cpu_s);
    }

    fn pager_latency(&mut self, stats: &PagerStats, domain: (&str, &str)) {
        const NAME: &str = "heca_fault_duration_seconds";
        let about = ("gauge", "Time of remote faults and of their parts, since the start.");
        let latency = &stats.latency;
        let parts: [(&str, Quantiles); 4] = [
            ("all", latency.fault_us),
            ("queue", latency.queue_us),
            ("network", latency.network_us),
            ("install", latency.install_us),
        ];
        for (part, quantiles) in parts {
            for (quantile, us) in
                [("0.5", quantiles.p50), ("0.99", quantiles.p99), ("1", quantiles.max)]
            {
                let labels = [domain, ("part", part), ("quantile", quantile)];
                self.add(NAME, about, &labels, us / 1e6);
            }
        }
    }

    /// Adds the figures of a sponsor.
    pub fn sponsor(&mut self, server: &SponsorServer) {
        let usage = server.store().usage();
        for (state, bytes) in
            [("offered", usage.offer), ("reserved", usage.reserved), ("stored", usage.stored)]
        {
            let about = ("gauge", "Memory that this host sponsors.");
            self.add("heca_sponsor_memory_bytes", about, &[("state", state)], bytes as f64);
        }
        for (state, on) in
            [("draining", server.store().is_draining()), ("pressed", server.store().is_pressed())]
        {
            let about = ("gauge", "Whether this host wants to be rid of what it sponsors.");
            let on = f64::from(u8::from(on));
            self.add("heca_sponsor_leaving", about, &[("state", state)], on);
        }
        let about = ("gauge", "Regions that this host sponsors.");
        self.add("heca_sponsor_regions", about, &[], usage.regions as f64);
        let counters = server.counters();
        for (direction, count) in
            [("read", &counters.pages_read), ("written", &counters.pages_written)]
        {
            let about = ("counter", "Pages served by this sponsor.");
            let count = count.load(Ordering::Relaxed) as f64;
            self.add("heca_sponsor_pages_total", about, &[("direction", direction)], count);
        }
        let about = ("counter", "Requests refused by this sponsor.");
        let refused = counters.pages_refused.load(Ordering::Relaxed)
            + counters.frames_refused.load(Ordering::Relaxed);
        self.add("heca_sponsor_refused_total", about, &[], refused as f64);
    }

    /// The text.
    #[must_use]
    pub fn finish(mut self) -> String {
        let version = env!("CARGO_PKG_VERSION");
        self.add("heca_build_info", ("gauge", "Version of heca."), &[("version", version)], 1.0);
        let mut text = String::new();
        for (name, (kind, help, lines)) in &self.families {
            writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{}", lines.trim_end())
                .expect("writing to a string");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_of_one_name_come_together_and_labels_are_escaped() {
        let mut text = Text::default();
        let about = ("gauge", "Help.");
        text.add("heca_a", about, &[("l", "x\"y\\z")], 1.0);
        text.add("heca_b", about, &[], 2.5);
        text.add("heca_a", about, &[("l", "w")], 3.0);
        let finished = text.finish();
        let expected = "# HELP heca_a Help.\n# TYPE heca_a gauge\n\
                        heca_a{l=\"x\\\"y\\\\z\"} 1\nheca_a{l=\"w\"} 3\n\
                        # HELP heca_b Help.\n# TYPE heca_b gauge\nheca_b 2.5\n";
        assert!(finished.starts_with(expected), "{finished}");
        assert!(finished.contains("heca_build_info{version="));
    }
}
