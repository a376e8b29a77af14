//! A sender that delivers at least once: again and again until it is told 2xx, and late once more.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use crate::common::app::{App, event};
use crate::process::Process;

/// How long it waits for an answer, and before it delivers again.
const PATIENCE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(20);

/// How many events are under way at once while it sends all the time, and the pause of each worker between two.
const WORKERS: usize = 4;
const BREATH: Duration = Duration::from_millis(5);

/// Clones are one sender.
#[derive(Clone)]
pub struct Sender {
    client: Client<HttpConnector, Full<Bytes>>,
    log: Arc<Mutex<Log>>,
}

/// What it has sent and been told.
#[derive(Clone, Default)]
pub struct Log {
    pub requests: usize,
    pub events: BTreeSet<String>,
    pub acknowledged: BTreeSet<String>,
    /// When it was told 2xx.
    pub accepted: Vec<Instant>,
}

/// Where a delivery goes.
#[derive(Clone)]
pub enum Target {
    Here(App),
    There(SocketAddr),
}

/// New events all the time, each delivered twice at once, to two of the targets.
pub struct Load {
    ends: Arc<AtomicBool>,
    workers: Vec<JoinHandle<()>>,
}

// === impl Sender ===

impl Sender {
    pub fn new() -> Self {
        let client = Client::builder(TokioExecutor::new()).http2_only(true).build_http();
        Self { client, log: Arc::default() }
    }

    pub fn log(&self) -> Log {
        self.log.lock().unwrap().clone()
    }

    /// Notes that an event is delivered.
    pub fn sends(&self, id: &str) {
        let mut log = self.log.lock().unwrap();
        log.requests += 1;
        log.events.insert(id.to_owned());
    }

    /// Delivers once. Tells the status, if there was an answer in time.
    pub async fn send(&self, target: &Target, id: &str) -> Option<StatusCode> {
        self.sends(id);
        let answered = async {
            match target {
                Target::Here(app) => Some(app.send(event(id)).await.status),
                Target::There(addr) => {
                    let request = Request::post(format!("http://{addr}/hooks")).header("x-id", id);
                    let request = request.body(Full::new(Bytes::from_static(b"event"))).unwrap();
                    let response = self.client.request(request).await.ok()?;
                    let (head, body) = response.into_parts();
                    body.collect().await.ok()?;
                    Some(head.status)
                }
            }
        };
        let status = timeout(PATIENCE, answered).await.ok().flatten();
        if status.is_some_and(|status| status.is_success()) {
            let mut log = self.log.lock().unwrap();
            log.acknowledged.insert(id.to_owned());
            log.accepted.push(Instant::now());
        }
        status
    }

    /// Delivers an event until it is told 2xx, to one target after the other.
    pub async fn deliver(&self, targets: &[Target], id: &str) {
        for target in targets.iter().cycle() {
            if self.send(target, id).await.is_some_and(|status| status.is_success()) {
                return;
            }
            sleep(PAUSE.mul_f64(rand::random_range(0.5..1.5))).await;
        }
    }

    /// Delivers an event in a task of its own.
    pub fn delivering(&self, targets: &[Target], id: &str) -> JoinHandle<()> {
        let (sender, targets, id) = (self.clone(), targets.to_vec(), id.to_owned());
        tokio::spawn(async move { sender.deliver(&targets, &id).await })
    }

    /// Delivers every event that was ever sent once more, some at a time.
    pub async fn late_duplicates(&self, targets: &[Target]) {
        let events: Vec<String> = self.log().events.into_iter().collect();
        for some in events.chunks(32) {
            join_all(some.iter().map(|id| self.deliver(targets, id))).await;
        }
    }

    /// Sends all the time, until it is ended.
    pub fn load(&self, targets: &[Target]) -> Load {
        let (ends, next) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let worker = |_| {
            let (sender, mut targets) = (self.clone(), targets.to_vec());
            let (ends, next) = (Arc::clone(&ends), Arc::clone(&next));
            tokio::spawn(async move {
                while !ends.load(Ordering::SeqCst) {
                    let id = format!("load-{}", next.fetch_add(1, Ordering::SeqCst));
                    targets.rotate_left(1);
                    let other: Vec<Target> = targets.iter().rev().cloned().collect();
                    tokio::join!(sender.deliver(&targets, &id), sender.deliver(&other, &id));
                    sleep(BREATH).await;
                }
            })
        };
        Load { workers: (0..WORKERS).map(worker).collect(), ends }
    }
}

// === impl Load ===

impl Load {
    /// Returns when all events have been acknowledged.
    pub async fn end(self) {
        self.ends.store(true, Ordering::SeqCst);
        for worker in self.workers {
            worker.await.unwrap();
        }
    }
}

// === impl Target ===

impl From<&App> for Target {
    fn from(app: &App) -> Self {
        Self::Here(app.clone())
    }
}

impl From<&Process> for Target {
    fn from(process: &Process) -> Self {
        Self::There(process.addr)
    }
}
