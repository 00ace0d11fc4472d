//! A process whose memory is paged, and sponsors for it.
#![allow(clippy::unwrap_used, dead_code, missing_docs, reason = "each test uses its part of this")]

pub mod process;

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use heca_agent::link::Security;
use heca_agent::pager::{self, PagerConfig, PagerHandle};
use heca_agent::sponsor::SponsorServer;
use heca_agent::store::Store;
use heca_api::{EvictionChoice, SponsorAddress};
use heca_lab::heca_binary;
use heca_types::ByteSize;
use heca_types::limits::PAGE_BYTES;
use serde_json::{Value, json};

pub const PAGES: usize = 16_384;
pub const LOCAL: ByteSize = ByteSize(16 << 20);

/// One test at a time: they share two processors, and one of them turns swap on.
static SERIAL: Mutex<()> = Mutex::new(());

/// A directory on tmpfs with sponsors and a RAM file; all of it goes away at the end.
pub struct Bench {
    pub dir: PathBuf,
    pub sponsors: Vec<Option<SponsorServer>>,
    _serial: MutexGuard<'static, ()>,
}

impl Bench {
    pub fn new(name: &str, sponsors: usize) -> Self {
        let serial = SERIAL.lock().unwrap_or_else(PoisonError::into_inner);
        let dir = Path::new("/dev/shm").join(format!("heca-test-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let mut bench = Self { dir, sponsors: Vec::new(), _serial: serial };
        for i in 0..sponsors {
            let store = Store::open(&bench.dir.join(format!("s{i}")), ByteSize(1 << 30)).unwrap();
            let server =
                SponsorServer::start(store, "127.0.0.1:0", Duration::ZERO, Security::Plaintext)
                    .unwrap();
            bench.sponsors.push(Some(server));
        }
        File::create_new(bench.ram()).unwrap().set_len((PAGES * PAGE_BYTES) as u64).unwrap();
        bench
    }

    pub fn ram(&self) -> PathBuf {
        self.dir.join("ram")
    }

    pub fn config(&self, pid: i32, replicas: usize, eviction: EvictionChoice) -> PagerConfig {
        let addresses = self.sponsors.iter().flatten().map(|s| s.address().to_string());
        PagerConfig {
            replicas,
            eviction,
            lease_ms: 60_000,
            rebuild_after_ms: 500,
            ..PagerConfig::new(
                pid,
                self.ram(),
                LOCAL,
                addresses.map(|address| SponsorAddress { address, weight: 1 }).collect(),
            )
        }
    }

    pub fn regions(&self) -> u64 {
        self.sponsors.iter().flatten().map(|s| s.store().usage().regions).sum()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.sponsors.clear();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// The process whose memory is paged.
pub struct Target {
    pub child: Child,
    pub input: Option<ChildStdin>,
    pub output: BufReader<ChildStdout>,
}

impl Target {
    pub fn start(ram: &Path) -> Self {
        let mut child = Command::new(heca_binary().unwrap())
            .args(["bench-target", "--file"])
            .arg(ram)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        Self { child, input, output }
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub fn ask(&mut self, order: &Value) {
        let input = self.input.as_mut().unwrap();
        writeln!(input, "{order}").unwrap();
        input.flush().unwrap();
    }

    pub fn answer(&mut self) -> Value {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    pub fn hammer(&mut self, ms: u64, seed: u64) -> Value {
        self.ask(&json!({ "Hammer": { "threads": 3, "ms": ms, "seed": seed } }));
        self.answer()
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.input.take();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn start(config: &PagerConfig) -> PagerHandle {
    pager::start(config).unwrap_or_else(|error| panic!("{error}: {error:?}"))
}
