//! A pager in a process of its own.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use heca_agent::pager::PagerConfig;
use heca_api::{Client, ClientError, PagerStats};
use heca_lab::heca_binary;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// A pager that can be killed and replaced; it ends when dropped.
pub struct PagerProcess {
    child: Child,
    pub config: PagerConfig,
    dir: PathBuf,
    /// Where it takes memory in; none if it does not.
    pub listens: Option<String>,
}

impl PagerProcess {
    /// Starts one with its files in a directory; it serves when this returns.
    pub fn start(config: PagerConfig, dir: &Path) -> Self {
        std::fs::create_dir_all(dir).unwrap();
        let (child, listens) = spawn(&config, dir);
        Self { child, config, dir: dir.to_owned(), listens }
    }

    /// Kills the pager and starts the next one; returns how long nobody served faults.
    pub fn replace(&mut self) -> Duration {
        self.child.kill().unwrap();
        let lost = Instant::now();
        self.child.wait().unwrap();
        let config = PagerConfig { resume: true, ..self.config.clone() };
        (self.child, self.listens) = spawn(&config, &self.dir);
        lost.elapsed()
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for it to end by itself.
    pub fn wait(&mut self) {
        self.child.wait().unwrap();
    }

    pub fn stats(&self) -> PagerStats {
        self.get("/v1/stats")
    }

    pub fn get<T: DeserializeOwned>(&self, path: &str) -> T {
        self.call(path, None::<&()>)
    }

    pub fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> T {
        self.call(path, Some(body))
    }

    fn call<T: DeserializeOwned>(&self, path: &str, body: Option<&impl Serialize>) -> T {
        let client = Client::new(&self.dir.join("pager.sock"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            let answer = runtime.block_on(async {
                match body {
                    Some(body) => client.post(path, body).await,
                    None => client.get(path).await,
                }
            });
            match answer {
                Ok(value) => return value,
                // Its socket comes a moment after its word.
                Err(ClientError::Unreachable { .. }) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(error) => panic!("{path}: {error}"),
            }
        }
    }
}

impl Drop for PagerProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(config: &PagerConfig, dir: &Path) -> (Child, Option<String>) {
    let file = dir.join("pager.json");
    std::fs::write(&file, serde_json::to_vec(config).unwrap()).unwrap();
    let mut child = Command::new(heca_binary().unwrap())
        .args(["pager", "--config"])
        .arg(&file)
        .arg("--socket")
        .arg(dir.join("pager.sock"))
        .arg("--last")
        .arg(dir.join("last.json"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.contains("ready"), "{line}");
    let state: Value = serde_json::from_str(&line).unwrap();
    (child, state["listens"].as_str().map(str::to_owned))
}
