use heca_types::limits::EXTENT_BYTES;
use proptest::prelude::*;

use super::*;

const OFFER: u64 = 10 * EXTENT_BYTES;

fn id(number: u8) -> RegionId {
    RegionId::from_bytes([number; 16])
}

fn owner(number: u8) -> OwnerId {
    OwnerId::from_bytes([number; 16])
}

fn open(region: u8, epoch: u64, by: u8, extents: &[u32], quota_bytes: u64) -> OpenRequest {
    OpenRequest {
        region: id(region),
        epoch: Epoch(epoch),
        owner: owner(by),
        quota_bytes,
        lease_ms: 60_000,
        extents: extents.iter().map(|&e| ExtentIndex(e)).collect(),
    }
}

fn release(region: u8, epoch: u64, by: u8, extents: &[u32], quota_bytes: u64) -> ReleaseRequest {
    ReleaseRequest {
        region: id(region),
        epoch: Epoch(epoch),
        owner: owner(by),
        quota_bytes,
        lease_ms: 60_000,
        extents: extents.iter().map(|&e| ExtentIndex(e)).collect(),
    }
}

fn status<T: std::fmt::Debug>(result: Result<T, Refusal>) -> Status {
    result.expect_err("refused").status
}

#[test]
fn a_release_lowers_the_quota_and_closes_with_the_last_extent() {
    let mut sponsor = Sponsor::new(OFFER);
    sponsor.open(0, &open(1, 1, 1, &[0, 2, 5], 3 * EXTENT_BYTES)).expect("room");
    let part = release(1, 1, 1, &[2, 7], EXTENT_BYTES);
    for _ in 0..2 {
        let Ok(Released::Kept(region)) = sponsor.release(100, &part) else { panic!("kept") };
        assert_eq!(region.extents, [ExtentIndex(0), ExtentIndex(5)]);
        assert_eq!((region.quota_bytes, region.expires_ms), (EXTENT_BYTES, 60_100));
        assert_eq!(sponsor.reserved_bytes(), EXTENT_BYTES);
    }
    let more = release(1, 1, 1, &[], 9 * EXTENT_BYTES);
    sponsor.release(0, &more).expect("nothing to release is no fault");
    assert_eq!(sponsor.reserved_bytes(), EXTENT_BYTES, "a release never raises the quota");
    let rest = release(1, 1, 1, &[5, 0], EXTENT_BYTES);
    assert_eq!(sponsor.release(0, &rest), Ok(Released::Closed));
    assert_eq!((sponsor.reserved_bytes(), sponsor.regions().count()), (0, 0));
    assert_eq!(status(sponsor.release(0, &rest)), Status::UnknownRegion);
}

#[test]
fn only_the_owner_releases_and_closes_and_only_under_its_epoch() {
    let mut sponsor = Sponsor::new(OFFER);
    sponsor.open(0, &open(1, 5, 1, &[0, 1], EXTENT_BYTES)).expect("room");
    for epoch in [4, 6] {
        let refused = sponsor.release(0, &release(1, epoch, 1, &[0], 0));
        assert_eq!(status(refused), Status::StaleEpoch);
    }
    assert_eq!(status(sponsor.release(0, &release(1, 5, 2, &[0], 0))), Status::OwnerMismatch);
    assert_eq!(status(sponsor.release(0, &release(2, 5, 1, &[0], 0))), Status::UnknownRegion);
    assert_eq!(status(sponsor.close(id(1), Epoch(5), owner(2))), Status::OwnerMismatch);
    assert_eq!(status(sponsor.close(id(1), Epoch(4), owner(1))), Status::StaleEpoch);
    assert_eq!(sponsor.region(id(1)).expect("held").extents.len(), 2);
    sponsor.close(id(1), Epoch(5), owner(1)).expect("its own");
}

#[test]
fn a_sponsor_that_accepts_nothing_new_lets_owners_come_back() {
    let mut sponsor = Sponsor::new(OFFER);
    sponsor.open(0, &open(1, 1, 1, &[0, 1], EXTENT_BYTES)).expect("room");
    sponsor.accepting = false;
    assert_eq!(status(sponsor.open(0, &open(2, 1, 1, &[0], 0))), Status::Draining);
    assert_eq!(status(sponsor.open(0, &open(1, 1, 1, &[0, 2], 0))), Status::Draining);
    assert_eq!(status(sponsor.open(0, &open(1, 2, 2, &[0, 2], 0))), Status::Draining);
    assert_eq!(sponsor.region(id(1)).expect("held").epoch, Epoch(1), "a refusal changes nothing");
    sponsor.open(0, &open(1, 1, 1, &[0, 1], EXTENT_BYTES)).expect("the same again");
    sponsor.open(0, &open(1, 2, 2, &[1], EXTENT_BYTES)).expect("a takeover");
    sponsor.release(0, &release(1, 2, 2, &[1], 0)).expect("a release");
    assert_eq!(status(sponsor.open(0, &open(1, 2, 2, &[1], 0))), Status::Draining);
    sponsor.accepting = true;
    sponsor.open(0, &open(1, 2, 2, &[1], 0)).expect("accepted again");
}

#[derive(Debug, Clone)]
enum Step {
    Open { region: u8, epoch: u64, by: u8, extents: Vec<u32>, quota: u64 },
    Release { region: u8, epoch: u64, by: u8, extents: Vec<u32>, quota: u64 },
    Close { region: u8, epoch: u64, by: u8 },
    Claim { region: u8, epoch: u64 },
    Wait { ms: u64 },
    Accept { yes: bool },
}

fn steps() -> impl Strategy<Value = Step> {
    let region = 0u8..4;
    let epoch = 0u64..4;
    let by = 0u8..2;
    let extents = || proptest::collection::vec(0u32..6, 0..4);
    let quota = || (0u64..7 * EXTENT_BYTES).prop_map(|bytes| bytes / 3);
    prop_oneof![
        4 => (region.clone(), epoch.clone(), by.clone(), extents(), quota())
            .prop_map(|(region, epoch, by, extents, quota)| {
                Step::Open { region, epoch, by, extents, quota: quota * 3 }
            }),
        3 => (region.clone(), epoch.clone(), by, extents(), quota())
            .prop_map(|(region, epoch, by, extents, quota)| {
                Step::Release { region, epoch, by, extents, quota }
            }),
        1 => (region.clone(), epoch.clone(), 0u8..2)
            .prop_map(|(region, epoch, by)| Step::Close { region, epoch, by }),
        2 => (region, epoch).prop_map(|(region, epoch)| Step::Claim { region, epoch }),
        1 => (0u64..40_000).prop_map(|ms| Step::Wait { ms }),
        1 => any::<bool>().prop_map(|yes| Step::Accept { yes }),
    ]
}

proptest! {
    /// PL-2, and the sum that it is judged by.
    #[test]
    fn a_sponsor_never_promises_more_than_its_offer(steps in proptest::collection::vec(steps(), 1..80)) {
        let mut sponsor = Sponsor::new(OFFER);
        let mut now_ms = 0;
        for step in steps {
            let before = sponsor.clone();
            let refused = match step {
                Step::Open { region, epoch, by, extents, quota } => {
                    sponsor.open(now_ms, &open(region, epoch, by, &extents, quota)).is_err()
                }
                Step::Release { region, epoch, by, extents, quota } => {
                    sponsor.release(now_ms, &release(region, epoch, by, &extents, quota)).is_err()
                }
                Step::Close { region, epoch, by } => {
                    sponsor.close(id(region), Epoch(epoch), owner(by)).is_err()
                }
                Step::Claim { region, epoch } => {
                    sponsor.claim_page(id(region), Epoch(epoch)).is_err()
                }
                Step::Wait { ms } => {
                    now_ms += ms;
                    sponsor.expire(now_ms);
                    false
                }
                Step::Accept { yes } => {
                    sponsor.accepting = yes;
                    false
                }
            };
            let sum: u64 = sponsor.regions().map(|(_, r)| r.quota_bytes).sum();
            prop_assert_eq!(sponsor.reserved_bytes(), sum);
            prop_assert!(sum <= OFFER, "PL-2: {} of {}", sum, OFFER);
            for (id, region) in sponsor.regions() {
                prop_assert!(region.extents.is_sorted() && region.expires_ms > now_ms);
                let old = before.region(*id).map_or(Epoch(0), |r| r.epoch);
                prop_assert!(region.epoch >= old, "EP-1: an epoch went back");
            }
            if refused {
                prop_assert!(sponsor.regions().eq(before.regions()), "a refusal changes nothing");
            }
        }
    }
}
