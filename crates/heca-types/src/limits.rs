//! Every bound of the system, named once. Relations between bounds are checked when compiling.

/// Size of a page, in bytes. The unit of faults, transfers and checksums.
pub const PAGE_BYTES: usize = 4096;
/// Size of an extent, in bytes. The unit of placement.
pub const EXTENT_BYTES: u64 = 64 << 20;
/// Pages in an extent.
pub const EXTENT_PAGES: u64 = EXTENT_BYTES / PAGE_BYTES as u64;

/// Largest region, in bytes (16 TiB): page indexes fit 32 bits in the pager's tables.
pub const REGION_BYTES_MAX: u64 = 16 << 40;
/// Largest number of extents in a region.
pub const REGION_EXTENTS_MAX: u32 = (REGION_BYTES_MAX / EXTENT_BYTES) as u32;
/// Regions that one sponsor holds at the most.
pub const REGIONS_MAX: usize = 4096;

/// Sponsors of one region. Replica sets index them with a byte.
pub const SPONSORS_MAX: usize = 16;
/// Replicas of one extent. The pager keeps their acknowledgements in four bits of a page's word.
pub const REPLICAS_MAX: usize = 4;
/// Replicas that a user may ask for: one more is there while an extent moves.
pub const REPLICAS_WANTED_MAX: usize = REPLICAS_MAX - 1;

/// Pages in one frame.
pub const FRAME_PAGES_MAX: usize = 64;
/// Payload of one frame, in bytes: a full write frame fits, and a list of all extents.
pub const FRAME_PAYLOAD_MAX: usize = 320 << 10;
/// Text of an error frame, in bytes.
pub const ERROR_TEXT_MAX: usize = 1024;
/// Address of a source sponsor in a pull, in bytes.
pub const ADDRESS_BYTES_MAX: usize = 256;

/// Pages of demand reads in flight to one sponsor.
pub const DEMAND_PAGES_IN_FLIGHT_MAX: usize = 256;
/// Pages of prefetch in flight over all sponsors.
pub const PREFETCH_PAGES_IN_FLIGHT_MAX: usize = 512;
/// Pages ahead of a sequential stream that prefetch may be.
pub const PREFETCH_WINDOW_MAX: u32 = 512;
/// Pages that are mapped along with the one that a stream touched.
pub const MAP_AHEAD_PAGES: usize = 64;
/// Pages that eviction takes out of use in one step.
pub const EVICT_BATCH_PAGES: usize = 64;
/// Neighbouring pages, from a multiple of this on, that eviction takes together: those that one page
/// of a page table maps.
pub const EVICT_GROUP_PAGES: u64 = 512;
/// Pages between "chosen as victim" and "stored by all replicas".
pub const EVICT_PAGES_IN_FLIGHT_MAX: usize = 512;
/// Pages that are being copied between sponsors for one region.
pub const PULLS_IN_FLIGHT_MAX: usize = 256;
/// userfaultfd messages that are read by one system call.
pub const FAULT_BATCH: usize = 64;

/// Connections that one sponsor serves.
pub const CONNECTIONS_MAX: usize = 1024;
/// Time to connect to a sponsor and agree on a version, in milliseconds.
pub const CONNECT_TIMEOUT_MS: u64 = 3_000;
/// A connection whose peer acknowledges nothing for this long is dead, in milliseconds.
pub const SILENCE_TIMEOUT_MS: u64 = 5_000;
/// Pause between two attempts to reach a sponsor that is down, in milliseconds.
pub const RECONNECT_PAUSE_MS: u64 = 500;

/// Time for a source sponsor to answer one request of a sponsor that pulls pages from it, in
/// milliseconds.
pub const PULL_TIMEOUT_MS: u64 = 2_000;

/// Pause between two signs of life that a pager asks of each sponsor, in milliseconds.
pub const HEARTBEAT_MS: u64 = 50;
/// Default time without a sign of life after which a sponsor counts as dead, in milliseconds.
pub const DETECT_MS_DEFAULT: u64 = 300;
/// Default time that a sponsor may be away before its extents go elsewhere, in milliseconds.
pub const REBUILD_AFTER_MS_DEFAULT: u64 = 10_000;
/// Default bound of the traffic of rebuilding one region, in bytes a second.
pub const REBUILD_BYTES_PER_S_DEFAULT: u64 = 200 << 20;
/// Time for a sponsor to answer a request to copy a frame of pages, in milliseconds: it may have to
/// connect to the source first.
pub const COPY_TIMEOUT_MS: u64 = 8_000;
/// Shortest and longest time after which a read is hedged, in microseconds.
pub const HEDGE_US: (u64, u64) = (300, 20_000);
/// Reads that may be hedged, one in so many.
pub const HEDGE_ONE_IN: u64 = 20;

/// Default lease of a region, in milliseconds (30 min): what a sponsor holds for a demander that
/// vanished is freed after this time. The lease is only garbage collection, epochs do the fencing;
/// so it must outlive any restart of a demander's agent and pager.
pub const LEASE_MS_DEFAULT: u64 = 1_800_000;
/// Shortest lease that a sponsor grants, in milliseconds.
pub const LEASE_MS_MIN: u64 = 1_000;
/// Longest lease that a sponsor grants, in milliseconds.
pub const LEASE_MS_MAX: u64 = 24 * 3_600_000;

/// Smallest local budget, in pages (16 MiB): below this one fault can need more frames at once
/// than there are (in flight, held for eviction, in use by each vCPU).
pub const BUDGET_PAGES_MIN: u64 = 4096;

const _: () = {
    assert!(EXTENT_BYTES.is_multiple_of(PAGE_BYTES as u64));
    assert!(FRAME_PAYLOAD_MAX >= FRAME_PAGES_MAX * (PAGE_BYTES + 64));
    assert!(FRAME_PAYLOAD_MAX >= FRAME_PAGES_MAX * 64 + ADDRESS_BYTES_MAX);
    assert!(
        PULL_TIMEOUT_MS < SILENCE_TIMEOUT_MS,
        "a slow source must not cost the puller its peer"
    );
    assert!(LEASE_MS_MIN <= LEASE_MS_DEFAULT && LEASE_MS_DEFAULT <= LEASE_MS_MAX);
    assert!(EVICT_BATCH_PAGES <= FRAME_PAGES_MAX, "a batch goes to a sponsor as one frame");
    assert!(EXTENT_PAGES.is_multiple_of(EVICT_GROUP_PAGES), "a group has one replica set");
    assert!(EVICT_PAGES_IN_FLIGHT_MAX as u64 * 4 <= BUDGET_PAGES_MIN);
    assert!(PREFETCH_PAGES_IN_FLIGHT_MAX as u64 * 4 <= BUDGET_PAGES_MIN);
    assert!(REGION_BYTES_MAX / PAGE_BYTES as u64 <= u32::MAX as u64 + 1);
    assert!(REPLICAS_MAX <= 4 && SPONSORS_MAX <= 16);
};
