//! Bytes through channels.

use std::io::{ErrorKind, IoSlice, Read, Write};
use std::net::Shutdown;
use std::time::Instant;

use rustls::{ClientConfig, ClientConnection};

use super::*;
use crate::tls::{harden, provider, server_name, server_verifier};
use crate::{ALPN_PAGES, HOST_ROLE};

fn pattern(n: usize, seed: usize) -> Vec<u8> {
    (0..n).map(|i| ((i + seed).wrapping_mul(2_654_435_761) >> 7) as u8).collect()
}

fn would_block<T: std::fmt::Debug>(result: io::Result<T>) -> bool {
    result.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
}

/// Drives one end without blocking: sends `out` in parts, reads `expect` in small pieces.
fn exchange(mut channel: Channel, out: &[u8], expect: &[u8], piece: usize) -> Channel {
    let (mut sent, mut got, mut full) = (0, Vec::new(), 0);
    let mut buf = vec![0; piece];
    let deadline = Instant::now() + 30 * SECOND;
    while sent < out.len() || got.len() < expect.len() || channel.has_buffered_output() {
        assert!(Instant::now() < deadline, "stuck: {sent} sent, {} got", got.len());
        let rest = &out[sent..];
        let (head, tail) = rest.split_at(rest.len().min(64));
        match channel.send_vectored(&[IoSlice::new(head), IoSlice::new(tail)]) {
            Ok(n) => sent += n,
            Err(error) if error.kind() == ErrorKind::WouldBlock => full += 1,
            Err(error) => panic!("{error}"),
        }
        while let Ok(n) = channel.recv(&mut buf) {
            assert_ne!(n, 0, "closed early");
            got.extend_from_slice(&buf[..n]);
            if got.len() == expect.len() {
                break;
            }
        }
        channel.flush().unwrap();
        if full > 0 {
            thread::yield_now();
        }
    }
    assert!(got == expect, "wrong bytes");
    channel
}

fn pairs(lab: &Lab) -> Vec<(Channel, Channel)> {
    let (plain_a, plain_b) = tcp();
    let (alpha, beta) = (lab.join("alpha"), lab.join("beta"));
    vec![(Channel::plain(plain_a), Channel::plain(plain_b)), talk(&alpha, &beta)]
}

#[test]
fn megabytes_both_ways_through_small_reads() {
    let lab = Lab::new();
    let (one, two) = (pattern(5_000_001, 1), pattern(3_000_003, 2));
    for (a, b) in pairs(&lab) {
        let (mut a, mut b) = thread::scope(|scope| {
            let other = scope.spawn(|| exchange(b, &two, &one, 1000));
            (exchange(a, &one, &two, 4097), other.join().unwrap())
        });
        assert!(would_block(a.recv(&mut [0; 9])) && would_block(b.recv(&mut [0; 9])));
        a.close();
        assert_eq!(b.recv_blocking(&mut [0; 9]).unwrap(), 0);
        assert_eq!(b.recv(&mut [0; 9]).unwrap(), 0);
    }
}

#[test]
fn full_buffers_block_nobody_and_lose_nothing() {
    let lab = Lab::new();
    for (mut a, mut b) in pairs(&lab) {
        let data = pattern(64 << 20, 3);
        let mut sent = 0;
        while let Ok(n) = a.send(&data[sent..]) {
            assert!(n > 0);
            sent += n;
        }
        assert!(sent < data.len(), "the socket never filled");
        assert!(would_block(a.send(&data[sent..])));
        assert_eq!(a.has_buffered_output(), a.is_tls());
        assert!(!a.is_tls() || !a.flush().unwrap());
        let reader = thread::spawn(move || {
            let mut got = vec![0; sent];
            let mut done = 0;
            while done < sent {
                done += b.recv_blocking(&mut got[done..]).unwrap();
            }
            (b, got)
        });
        a.send_all(&[], Instant::now() + 20 * SECOND).unwrap();
        assert!(!a.has_buffered_output());
        let (mut b, got) = reader.join().unwrap();
        assert!(got == data[..sent], "wrong bytes");
        assert!(would_block(b.recv(&mut [0; 1])) && !b.has_buffered_input());
    }
}

#[test]
fn buffered_input_is_told() {
    let lab = Lab::new();
    let (mut a, mut b) = talk(&lab.join("alpha"), &lab.join("beta"));
    assert_eq!(a.send(b"hello").unwrap(), 5);
    assert_eq!(a.send(b" world").unwrap(), 6);
    let mut buf = [0; 3];
    assert_eq!(b.recv_blocking(&mut buf).unwrap(), 3);
    assert!(b.has_buffered_input());
    let mut rest = [0; 8];
    b.recv_all(&mut rest, Instant::now() + SECOND).unwrap();
    assert_eq!((&buf, &rest), (b"hel", b"lo world"));
    assert!(!b.has_buffered_input());
    b.stream().set_read_timeout(Some(SECOND / 50)).unwrap();
    assert!(would_block(b.recv_blocking(&mut buf)));
    assert_eq!((a.send(b"").unwrap(), b.recv_blocking(&mut []).unwrap()), (0, 0));
    // A peer that dies says no farewell.
    drop(a);
    assert_eq!(b.recv_blocking(&mut buf).unwrap(), 0);
}

#[test]
fn a_peer_that_changes_keys_or_drips_is_understood() {
    let lab = Lab::new();
    let (alpha, beta) = (lab.join("alpha"), lab.join("beta"));
    let (stream, peer) = tcp();
    stream.set_nodelay(true).unwrap();
    let server = beta.clone();
    let accepting = thread::spawn(move || Channel::accept(peer, &server, 5 * SECOND).unwrap());
    let config = alpha.configs().client.clone();
    let mut client = ClientConnection::new(config, server_name(HOST_ROLE)).unwrap();
    let mut socket = stream.try_clone().unwrap();
    while client.is_handshaking() || client.tls13_tickets_received() == 0 {
        client.complete_io(&mut socket).unwrap();
    }
    let mut channel = accepting.join().unwrap();
    let drip = |client: &mut ClientConnection, channel: &mut Channel, text: &[u8]| {
        client.writer().write_all(text).unwrap();
        let mut bytes = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut bytes).unwrap();
        }
        for byte in &bytes[..bytes.len() - 1] {
            (&stream).write_all(&[*byte]).unwrap();
            assert!(would_block(channel.recv(&mut [0; 64])));
        }
        (&stream).write_all(&bytes[bytes.len() - 1..]).unwrap();
        let mut got = vec![0; text.len()];
        channel.recv_all(&mut got, Instant::now() + SECOND).unwrap();
        assert_eq!(got, text);
    };
    drip(&mut client, &mut channel, b"one byte at a time");
    client.refresh_traffic_keys().unwrap();
    drip(&mut client, &mut channel, b"with new keys");
    channel.send_all(b"answer", Instant::now() + SECOND).unwrap();
    let mut got = [0; 6];
    rustls::Stream::new(&mut client, &mut socket).read_exact(&mut got).unwrap();
    assert_eq!(&got, b"answer");
    // What is no TLS any more is told, after what came before it.
    client.writer().write_all(b"last").unwrap();
    client.write_tls(&mut socket).unwrap();
    socket.write_all(&[0x17, 3, 3, 0, 32]).unwrap();
    socket.write_all(&[7; 32]).unwrap();
    thread::sleep(SECOND / 50);
    let mut got = [0; 64];
    assert_eq!(channel.recv_blocking(&mut got).unwrap(), 4);
    assert_eq!(channel.recv(&mut got).unwrap_err().kind(), ErrorKind::InvalidData);
    assert_eq!(channel.recv(&mut got).unwrap_err().kind(), ErrorKind::InvalidData);
}

#[test]
fn plaintext_and_silence_are_named() {
    let lab = Lab::new();
    let alpha = lab.join("alpha");
    for server in [false, true] {
        let shake = |stream, timeout| {
            let handshake = if server { Channel::accept } else { Channel::connect };
            reason(handshake(stream, &alpha, timeout))
        };
        let (stream, mut peer) = tcp();
        peer.write_all(b"HECA hello").unwrap();
        assert_eq!(shake(stream, SECOND), TlsError::Plaintext);
        let (stream, _peer) = tcp();
        assert_eq!(shake(stream, SECOND / 20), TlsError::Timeout);
        let (stream, peer) = tcp();
        peer.shutdown(Shutdown::Write).unwrap();
        assert_eq!(shake(stream, SECOND), TlsError::Closed);
        let (stream, mut peer) = tcp();
        peer.write_all(&[22, 3, 1, 0, 4, 1, 2, 3, 4]).unwrap();
        assert!(matches!(shake(stream, SECOND), TlsError::Other(_)));
    }
}

#[test]
fn a_client_without_certificate_and_a_wrong_port_are_named() {
    let lab = Lab::new();
    let alpha = lab.join("alpha");
    let identity = HostIdentity::load(&lab.host_dir("alpha")).unwrap();
    let verifier = server_verifier(identity.roots.clone().into(), Vec::new()).unwrap();
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_webpki_verifier(verifier)
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN_PAGES.to_vec()];
    harden(&mut config);
    let (stream, peer) = tcp();
    let server = alpha.clone();
    let accepting = thread::spawn(move || reason(Channel::accept(peer, &server, SECOND)));
    let client = ClientConnection::new(config.into(), server_name(HOST_ROLE)).unwrap();
    let refused = Channel::handshake(stream, client.into(), ALPN_PAGES, SECOND);
    assert_eq!(reason(refused), TlsError::OwnMissing);
    assert_eq!(accepting.join().unwrap(), TlsError::PeerAnonymous);
    // The enrolment server does not pass for a host.
    let stream = TcpStream::connect(lab.server.local_addr()).unwrap();
    let error = reason(Channel::connect(stream, &alpha, 5 * SECOND));
    assert!(matches!(error, TlsError::Protocol | TlsError::PeerRole), "{error}");
    // And the other way round: renewing from a host's port.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let accepting = thread::spawn(move || {
        reason(Channel::accept(listener.accept().unwrap().0, &alpha, 5 * SECOND))
    });
    let token = lab.pool.token(&address, super::HOUR, None).unwrap();
    assert!(join(&token, "beta", &lab.host_dir("beta")).is_err());
    accepting.join().unwrap();
}
