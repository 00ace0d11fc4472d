//! Which sponsors hold which extents of a region.

use heca_types::ExtentIndex;
use heca_types::limits::{REPLICAS_MAX, REPLICAS_WANTED_MAX, SPONSORS_MAX};
use serde::{Deserialize, Serialize};

/// The sponsors of one extent, as positions in the region's list of sponsors. The first is the
/// one that reads prefer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaSet {
    len: u8,
    sponsors: [u8; REPLICAS_MAX],
}

impl ReplicaSet {
    /// A set of these sponsors.
    ///
    /// # Panics
    /// If there are none, too many, or one twice.
    #[must_use]
    pub fn new(sponsors: &[u8]) -> Self {
        assert!((1..=REPLICAS_MAX).contains(&sponsors.len()), "{} replicas", sponsors.len());
        let mut set = Self { len: 0, sponsors: [0; REPLICAS_MAX] };
        for &sponsor in sponsors {
            assert!(set.position(sponsor).is_none(), "PL-1: sponsor {sponsor} twice");
            set.sponsors[usize::from(set.len)] = sponsor;
            set.len += 1;
        }
        set
    }

    /// The sponsors, the preferred one first.
    #[must_use]
    pub fn sponsors(&self) -> &[u8] {
        &self.sponsors[..usize::from(self.len)]
    }

    /// Position of a sponsor in the set.
    #[must_use]
    pub fn position(&self, sponsor: u8) -> Option<u8> {
        self.sponsors().iter().position(|&s| s == sponsor).map(|p| p as u8)
    }

    /// Number of replicas.
    #[must_use]
    pub fn count(&self) -> u8 {
        self.len
    }

    /// The set with one more sponsor, as the last; `None` if there is no room or it is in the set
    /// already.
    #[must_use]
    pub fn with(mut self, sponsor: u8) -> Option<Self> {
        if usize::from(self.len) == REPLICAS_MAX || self.position(sponsor).is_some() {
            return None;
        }
        self.sponsors[usize::from(self.len)] = sponsor;
        self.len += 1;
        Some(self)
    }

    /// The set without the replica at `position`, whose place the last one takes.
    ///
    /// # Panics
    /// If there is no such replica, or no other.
    #[must_use]
    pub fn without(mut self, position: u8) -> Self {
        assert!(position < self.len && self.len > 1, "an extent keeps a replica");
        self.len -= 1;
        self.sponsors[usize::from(position)] = self.sponsors[usize::from(self.len)];
        self.sponsors[usize::from(self.len)] = 0;
        self
    }

    /// Bit mask with one bit for each replica.
    #[must_use]
    pub fn all(&self) -> u8 {
        (1 << self.len) - 1
    }
}

/// Replica sets of all extents of a region.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    extents: Vec<ReplicaSet>,
}

/// Why extents cannot be placed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlacementError {
    /// Replicas must sit on distinct sponsors.
    #[error("{replicas} replicas need {replicas} sponsors; {sponsors} given")]
    TooFewSponsors {
        /// Replicas asked for.
        replicas: usize,
        /// Sponsors given.
        sponsors: usize,
    },
    /// Out of the allowed range.
    #[error("{replicas} replicas: 1 to {REPLICAS_WANTED_MAX} are possible")]
    Replicas {
        /// Replicas asked for.
        replicas: usize,
    },
    /// Out of the allowed range.
    #[error("{sponsors} sponsors: 1 to {SPONSORS_MAX} are possible")]
    Sponsors {
        /// Sponsors given.
        sponsors: usize,
    },
    /// A weight of zero would mean a sponsor that holds nothing.
    #[error("the weight of sponsor number {position} is 0; leave the sponsor out instead")]
    ZeroWeight {
        /// Position in the list, from 0.
        position: usize,
    },
}

impl Layout {
    /// Spreads `extents` extents with `replicas` replicas each over sponsors in proportion to
    /// `weights`. Deterministic. A sponsor holds an extent at most once, so a weight that calls
    /// for more than every extent is cut there and the rest goes to the others.
    ///
    /// # Errors
    /// Counts or weights that cannot be met; see [`PlacementError`].
    pub fn spread(extents: u32, weights: &[u32], replicas: usize) -> Result<Self, PlacementError> {
        let sponsors = weights.len();
        if !(1..=SPONSORS_MAX).contains(&sponsors) {
            return Err(PlacementError::Sponsors { sponsors });
        }
        if !(1..=REPLICAS_WANTED_MAX).contains(&replicas) {
            return Err(PlacementError::Replicas { replicas });
        }
        if sponsors < replicas {
            return Err(PlacementError::TooFewSponsors { replicas, sponsors });
        }
        if let Some(position) = weights.iter().position(|&w| w == 0) {
            return Err(PlacementError::ZeroWeight { position });
        }
        let mut held = vec![0u64; sponsors];
        let mut preferred = vec![0u64; sponsors];
        let extents = (0..extents)
            .map(|_| {
                // The sponsors that are furthest below their share, by (held + 1) / weight.
                let mut order: Vec<usize> = (0..sponsors).collect();
                order.sort_by(|&a, &b| {
                    let left = (held[a] + 1) * u64::from(weights[b]);
                    left.cmp(&((held[b] + 1) * u64::from(weights[a]))).then(a.cmp(&b))
                });
                order.truncate(replicas);
                // Reads go to the first: share that role by weight, too.
                order.sort_by_key(|&s| ((preferred[s] + 1) * 1_000_000 / u64::from(weights[s]), s));
                preferred[order[0]] += 1;
                for &sponsor in &order {
                    held[sponsor] += 1;
                }
                let set: Vec<u8> = order.iter().map(|&s| s as u8).collect();
                ReplicaSet::new(&set)
            })
            .collect();
        Ok(Self { extents })
    }

    /// Number of extents.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.extents.len() as u32
    }

    /// Whether the region has no extents.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }

    /// Replica set of an extent.
    #[must_use]
    pub fn replicas(&self, extent: ExtentIndex) -> ReplicaSet {
        self.extents[extent.0 as usize]
    }

    /// Gives an extent another replica set.
    pub fn set(&mut self, extent: ExtentIndex, set: ReplicaSet) {
        self.extents[extent.0 as usize] = set;
    }

    /// The extents that a sponsor holds, in rising order.
    pub fn extents_of(&self, sponsor: u8) -> impl Iterator<Item = ExtentIndex> + '_ {
        self.extents
            .iter()
            .enumerate()
            .filter(move |(_, set)| set.position(sponsor).is_some())
            .map(|(i, _)| ExtentIndex(i as u32))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(layout: &Layout, sponsors: u8) -> Vec<usize> {
        (0..sponsors).map(|s| layout.extents_of(s).count()).collect()
    }

    #[test]
    fn shares_follow_the_weights() {
        let layout = Layout::spread(128, &[2, 1, 1], 1).expect("possible");
        assert_eq!(held(&layout, 3), [64, 32, 32]);
    }

    #[test]
    fn mirrors_are_distinct_and_a_heavy_sponsor_holds_each_extent_once() {
        let layout = Layout::spread(10, &[100, 1, 1], 2).expect("possible");
        assert_eq!(held(&layout, 3), [10, 5, 5]);
    }

    #[test]
    fn reads_are_shared_between_mirrors() {
        let layout = Layout::spread(16, &[1, 1], 2).expect("possible");
        let first = (0..16).filter(|&e| layout.replicas(ExtentIndex(e)).sponsors()[0] == 0).count();
        assert_eq!(first, 8);
    }

    #[test]
    fn impossible_requests_say_why() {
        assert_eq!(
            Layout::spread(1, &[1], 2),
            Err(PlacementError::TooFewSponsors { replicas: 2, sponsors: 1 })
        );
        assert_eq!(Layout::spread(1, &[1, 0], 1), Err(PlacementError::ZeroWeight { position: 1 }));
        assert_eq!(Layout::spread(1, &[1; 17], 1), Err(PlacementError::Sponsors { sponsors: 17 }));
        assert_eq!(Layout::spread(1, &[1; 9], 5), Err(PlacementError::Replicas { replicas: 5 }));
    }
}
