//! Tokens, certificates, revocation, rotation.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, SystemTime};

use proptest::prelude::*;

use super::*;
use crate::{CERT_DAYS, Error, JoinToken, TokenError, fetch_crl, fuzz, renew};

fn refused<T: std::fmt::Debug>(result: Result<T, Error>) -> String {
    match result.unwrap_err() {
        Error::Refused { text, .. } => text,
        other => panic!("not refused by the pool: {other}"),
    }
}

fn csr() -> String {
    let key = crate::pool::new_key().unwrap();
    rcgen::CertificateParams::default().serialize_request(&*key).unwrap().pem().unwrap()
}

#[test]
fn a_pool_is_made_once() {
    let dir = tempfile::tempdir().unwrap();
    let pool = Pool::init(dir.path(), "one").unwrap();
    assert!(matches!(Pool::init(dir.path(), "two"), Err(Error::PoolExists { .. })));
    let again = Pool::open(dir.path()).unwrap();
    assert_eq!((again.id(), again.name()), (pool.id(), "one"));
    assert!(matches!(Pool::open(&dir.path().join("none")), Err(Error::Io { .. })));
}

#[test]
fn a_token_works_once_and_for_its_time() {
    let lab = Lab::new();
    let token = lab.pool.token(&lab.address(), HOUR, None).unwrap();
    let token = JoinToken::parse(&token.encode()).unwrap();
    let host = join(&token, "alpha", &lab.host_dir("alpha")).unwrap();
    assert_eq!((host.name(), host.pool_id()), ("alpha", lab.pool.id()));
    assert!(refused(join(&token, "beta", &lab.host_dir("beta"))).contains("used already"));

    let late = lab.pool.token(&lab.address(), Duration::ZERO, None).unwrap();
    assert!(refused(join(&late, "beta", &lab.host_dir("beta"))).contains("expired"));
    let other = Lab::new().pool.token(&lab.address(), HOUR, None).unwrap();
    assert!(matches!(lab.pool.redeem(other.secret(), &csr(), "beta"), Err(Error::TokenUnknown)));
    // That token names the CA of another pool, so this server is not even asked.
    let error = join(&other, "beta", &lab.host_dir("beta")).unwrap_err();
    assert!(error.to_string().contains("not of this pool"), "{error}");

    for name in ["", "-a", "a-", "A", "a.b", "heca-pool", "heca-host", &"a".repeat(64)] {
        let error = lab.pool.redeem(token.secret(), &csr(), name);
        assert!(matches!(error, Err(Error::Name { .. })), "{name}");
    }
}

#[test]
fn a_token_is_redeemed_by_one_of_many() {
    let lab = Lab::new();
    let token = lab.pool.token(&lab.address(), HOUR, None).unwrap();
    let (barrier, csr) = (Barrier::new(4), csr());
    let wins: usize = thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|i| {
                let (barrier, csr, token, dir) = (&barrier, &csr, &token, lab.host_dir("pool"));
                scope.spawn(move || {
                    let pool = Pool::open(&dir).unwrap();
                    barrier.wait();
                    match pool.redeem(token.secret(), csr, &format!("host-{i}")) {
                        Ok(_) => 1,
                        Err(Error::TokenUsed) => 0,
                        Err(other) => panic!("{other}"),
                    }
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    assert_eq!(wins, 1);
}

#[test]
fn a_name_belongs_to_one_host() {
    let lab = Lab::new();
    lab.join("alpha");
    let token = lab.pool.token(&lab.address(), HOUR, None).unwrap();
    assert!(refused(join(&token, "alpha", &lab.host_dir("thief"))).contains("choose another name"));
    join(&token, "beta", &lab.host_dir("beta")).expect("a refusal does not use the token up");
    let token = lab.pool.token(&lab.address(), HOUR, Some("alpha")).unwrap();
    assert!(refused(join(&token, "gamma", &lab.host_dir("gamma"))).contains("made for host"));
    join(&token, "alpha", &lab.host_dir("reinstalled")).unwrap();
}

#[test]
fn a_changed_token_is_noticed() {
    let lab = Lab::new();
    let token = lab.pool.token("10.0.0.1:7901", HOUR, None).unwrap();
    let text = token.encode();
    for i in 0..text.len() {
        for other in ['A', 'b', '-', '!'] {
            let mut changed: Vec<char> = text.chars().collect();
            if changed[i] != other {
                changed[i] = other;
                assert!(JoinToken::parse(&changed.iter().collect::<String>()).is_err(), "at {i}");
            }
        }
        assert!(JoinToken::parse(&text[..i]).is_err(), "cut at {i}");
    }
    let bad = format!("{}!{}", &text[..20], &text[21..]);
    assert_eq!(JoinToken::parse(&bad).unwrap_err(), TokenError::Character { position: 21 });
    for address in ["", "host", ":1", "host:0", "host:70000", "a b:1"] {
        assert!(lab.pool.token(address, HOUR, None).is_err(), "{address}");
    }
}

proptest! {
    #[test]
    fn no_text_confuses_the_token_parser(bytes: Vec<u8>, tail in "[A-Za-z0-9_-]{0,200}") {
        fuzz::token(&bytes);
        fuzz::token(format!("heca1.{tail}").as_bytes());
    }

    #[test]
    fn tokens_round_trip(fingerprint: [u8; 32], host in "[a-z0-9.]{1,240}", port in 1u16..) {
        let token = JoinToken::new(fingerprint, &format!("{host}:{port}")).unwrap();
        let text = token.encode();
        fuzz::token(text.as_bytes());
        let again = JoinToken::parse(&format!(" {}\n", *text)).unwrap();
        prop_assert_eq!(again.fingerprint(), token.fingerprint());
        prop_assert_eq!(again.secret(), token.secret());
        prop_assert_eq!(again.address(), token.address());
    }
}

#[test]
fn secrets_are_hidden() {
    let lab = Lab::new();
    let token = lab.pool.token(&lab.address(), HOUR, None).unwrap();
    let text = format!("{token:?}");
    assert!(text.contains("(hidden)") && !text.contains(&format!("{:?}", token.secret())));
    assert!(!text.contains(&crate::util::hex(token.secret())));
    let tls = lab.join("alpha");
    let identity = HostIdentity::load(&lab.host_dir("alpha")).unwrap();
    let key = format!("{:?}", identity.key().secret_der());
    for text in [format!("{identity:?}"), format!("{tls:?}"), format!("{:?}", lab.pool)] {
        assert!(!text.contains(&key[..60]) && !text.contains("PRIVATE"), "{text}");
    }
    let stored = fs::read_to_string(lab.host_dir("pool").join("tokens.json")).unwrap();
    assert!(!stored.contains(&crate::util::hex(token.secret())));

    lab.pool.rotate_ca().unwrap();
    for dir in ["pool", "alpha"] {
        let dir = lab.host_dir(dir);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&dir), 0o700);
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            assert_eq!(mode(&path), 0o600, "{}", path.display());
        }
    }
}

#[test]
fn strangers_are_refused_with_the_reason() {
    let (lab, other) = (Lab::new(), Lab::new());
    let (alpha, stranger) = (lab.join("alpha"), other.join("stranger"));
    assert_eq!(refusal(&stranger, &alpha), (TlsError::PeerForeign, TlsError::OwnForeign));
    // One that trusts this pool, but is not of it.
    let dir = lab.host_dir("mixed");
    copy(&lab.host_dir("alpha"), &dir, &["ca.pem", "crl.pem"]);
    let files = ["host.pem", "host-key.pem", "host.json"];
    copy(&other.host_dir("stranger"), &dir, &files);
    let mixed = TlsContext::new(&HostIdentity::load(&dir).unwrap()).unwrap();
    assert_eq!(refusal(&mixed, &alpha), (TlsError::OwnForeign, TlsError::PeerForeign));
    // A key that is not the certificate's.
    copy(&lab.host_dir("alpha"), &dir, &["host.pem", "host.json"]);
    assert!(matches!(HostIdentity::load(&dir), Err(Error::Damaged { .. })));
}

#[test]
fn a_revoked_host_is_refused_on_both_sides() {
    let lab = Lab::new();
    let (alpha, beta) = (lab.join("alpha"), lab.join("beta"));
    let (before, _peer) = talk(&alpha, &beta);
    assert_eq!(lab.pool.revoke("beta").unwrap(), 1);
    assert!(matches!(lab.pool.revoke("beta"), Err(Error::HostUnknown { .. })));
    talk(&alpha, &beta);
    fetch_crl(&lab.host_dir("alpha")).unwrap();
    alpha.reload().unwrap();
    assert_eq!(refusal(&beta, &alpha), (TlsError::OwnRevoked, TlsError::PeerRevoked));
    assert_eq!(refusal(&alpha, &beta), (TlsError::PeerRevoked, TlsError::OwnRevoked));
    assert_eq!(reason(before.recheck(&alpha)), TlsError::PeerRevoked);
    let error = renew(&lab.host_dir("beta")).unwrap_err();
    assert!(error.to_string().contains("was revoked"), "{error}");
    fetch_crl(&lab.host_dir("beta")).expect("anybody gets the lists");
    // It may join again, under its name; what it had before stays revoked.
    let again = lab.join("beta");
    talk(&alpha, &again);
    refusal(&alpha, &beta);
}

#[test]
fn certificates_expire_and_are_renewed() {
    let lab = Lab::new();
    let (alpha, old) = (lab.join("alpha"), lab.join_in_the_past("old", CERT_DAYS + 1));
    assert_eq!(refusal(&old, &alpha), (TlsError::OwnExpired, TlsError::PeerExpired));
    assert_eq!(refusal(&alpha, &old), (TlsError::PeerExpired, TlsError::OwnExpired));
    assert!(matches!(lab.pool.renew("old", &csr()), Err(Error::HostUnknown { .. })));

    let now = SystemTime::now();
    let tls = lab.join_in_the_past("aging", 21);
    let aging = HostIdentity::load(&lab.host_dir("aging")).unwrap();
    assert!(aging.needs_renewal(now) && aging.expires_in(now) < HOUR * 24 * 9);
    assert_eq!(aging.expires_in(now + HOUR * 24 * 10), Duration::ZERO);
    let fresh = renew(&lab.host_dir("aging")).unwrap();
    assert!(!fresh.needs_renewal(now) && fresh.expires_in(now) > HOUR * 24 * 29);
    assert_ne!(aging.key().secret_der(), fresh.key().secret_der());
    tls.reload().unwrap();
    assert_eq!(tls.not_after(), fresh.not_after());
    talk(&tls, &alpha);
    assert_eq!(lab.pool.hosts().unwrap().iter().filter(|host| host.name == "aging").count(), 2);
}

#[test]
fn a_renewal_that_was_cut_off_leaves_an_identity() {
    let lab = Lab::new();
    lab.join("alpha");
    let dir = lab.host_dir("alpha");
    let old = fs::read(dir.join("host-key.pem")).unwrap();
    renew(&dir).unwrap();
    // As if the last rename had not happened.
    fs::rename(dir.join("host-key.pem"), dir.join("host-key-new.pem")).unwrap();
    fs::write(dir.join("host-key.pem"), old).unwrap();
    HostIdentity::load(&dir).unwrap();
    renew(&dir).unwrap();
    HostIdentity::load(&dir).unwrap();
    assert!(!dir.join("host-key-new.pem").exists());
}

#[test]
fn a_new_ca_does_not_part_the_pool() {
    let lab = Lab::new();
    let (old, older) = (lab.join("old"), lab.join_in_the_past("older", 20));
    let early = lab.pool.token(&lab.address(), HOUR, None).unwrap();
    lab.pool.rotate_ca().unwrap();
    lab.pool.rotate_ca().unwrap();
    let new = lab.join("new");
    join(&early, "early", &lab.host_dir("early")).expect("its token names the oldest CA");
    for (a, b) in [(&old, &new), (&new, &old), (&new, &older), (&older, &old)] {
        talk(a, b);
    }
    // Who has the old CA's key revoked knows of it, too.
    lab.pool.revoke("older").unwrap();
    assert_eq!(lab.pool.crl().unwrap().matches("BEGIN X509 CRL").count(), 3);
    fetch_crl(&lab.host_dir("new")).unwrap();
    new.reload().unwrap();
    assert_eq!(refusal(&new, &older), (TlsError::PeerRevoked, TlsError::OwnRevoked));

    assert_eq!(lab.pool.prune_ca().unwrap(), 0, "the old CAs' certificates are valid");
    renew(&lab.host_dir("old")).unwrap();
    old.reload().unwrap();
    talk(&old, &new);
    lab.join("last");
    let now = crate::util::unix(SystemTime::now());
    // The newest CA's certificates expire at the same time, but it stays.
    assert_eq!(lab.pool.prune_ca_at(now + (CERT_DAYS + 1) * 86_400).unwrap(), 2);
    let pool = lab.host_dir("pool");
    let (ca, crl) = lab.pool.trust().unwrap();
    assert_eq!((ca.matches("BEGIN").count(), crl.matches("BEGIN").count()), (1, 1));
    assert!(!pool.join("ca-key-old-1.pem").exists() && !pool.join("ca-key-old-2.pem").exists());
    fetch_crl(&lab.host_dir("new")).unwrap();
    new.reload().unwrap();
    talk(&lab.join("newest"), &new);
}

#[test]
fn a_rotation_that_was_cut_off_goes_on() {
    let lab = Lab::new();
    let old = fs::read(lab.host_dir("pool").join("ca-key.pem")).unwrap();
    lab.pool.rotate_ca().unwrap();
    let dir = lab.host_dir("pool");
    fs::rename(dir.join("ca-key.pem"), dir.join("ca-key-new.pem")).unwrap();
    fs::write(dir.join("ca-key.pem"), old).unwrap();
    let alpha = lab.join("alpha");
    lab.pool.rotate_ca().unwrap();
    talk(&alpha, &lab.join("beta"));
    assert_eq!(lab.pool.crl().unwrap().matches("BEGIN").count(), 3, "every key is there");
}
