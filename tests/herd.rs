//! Ten thousand duplicates of one event, in four processes: one run, and everybody is told when it ends.
//!
//! `cargo test --release --test herd -- --nocapture` shows how long after the end of the run they are woken and answered. What a machine
//! that does other things takes for it is not asserted.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test panics where it fails")]
#![allow(clippy::print_stdout, reason = "it measures")]

mod common;

use std::collections::BTreeSet;
use std::env;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::pin::Pin;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::future::join_all;
use futures_util::task::{ArcWake, AtomicWaker, waker_ref};
use redis::AsyncCommands as _;
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tower::{Layer as _, Service as _, service_fn};
use tower_idempotency::key::{Key, header};
use tower_idempotency::{IdempotencyLayer, Ledger, RedisStore};

use common::app::{Answer, Incoming, answer, event};
use common::observed::{Observed, assert_paced, micros};
use common::redis::RedisServer;

const PROCESSES: usize = 4;
const EACH: usize = 2500;

/// Long enough for whoever waits to have slowed down.
const RUN: Duration = Duration::from_secs(2);
const LONG: Duration = Duration::from_secs(120);

const URL: &str = "HERD_REDIS_URL";

/// What a process has to tell.
#[derive(Debug, Deserialize, Serialize)]
struct Report {
    runs: u32,
    replays: usize,
    /// The answers that differ.
    answers: BTreeSet<u64>,
    /// When each of them was woken the last time, and when it had its answer.
    woken: Vec<u64>,
    answered: Vec<u64>,
    looks: Vec<u64>,
    hints: usize,
    completed: Option<u64>,
}

/// What a duplicate was told, and when.
struct Told {
    answer: u64,
    is_replayed: bool,
    woken: u64,
    answered: u64,
}

/// A future that tells when it was woken the last time.
struct Wakening<F> {
    future: F,
    wakening: Arc<Noted>,
}

#[derive(Default)]
struct Noted {
    at: AtomicU64,
    waker: AtomicWaker,
}

impl<F: Future + Unpin> Wakening<F> {
    fn of(future: F) -> Self {
        Self { future, wakening: Arc::new(Noted::default()) }
    }
}

impl<F: Future + Unpin> Future for Wakening<F> {
    type Output = (F::Output, u64);

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        self.wakening.waker.register(context.waker());
        let waker = waker_ref(&self.wakening).clone();
        let output = ready!(Pin::new(&mut self.future).poll(&mut Context::from_waker(&waker)));
        Poll::Ready((output, self.wakening.at.load(Ordering::SeqCst)))
    }
}

impl ArcWake for Noted {
    fn wake_by_ref(noted: &Arc<Self>) {
        noted.at.store(micros(), Ordering::SeqCst);
        noted.waker.wake();
    }
}

/// A process that does not outlive the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "one of the processes that the other test starts"]
async fn process() {
    let Ok(url) = env::var(URL) else { return };
    let mut redis = redis::Client::open(&*url).unwrap().get_multiplexed_async_connection().await.unwrap();
    let store = Observed::new(RedisStore::new(&url).unwrap());
    // A process that has yet to take in all its requests may be slow to hear the store.
    let ledger = Ledger::new(store.clone()).max_waiting(EACH).max_waiting_per_key(EACH).store_timeout(LONG);
    while ledger.lookup(&Key::from([0; 24])).await.is_err() {}
    let layer = IdempotencyLayer::webhook(&ledger, header("X-Id")).patience(LONG);
    let connection = redis.clone();
    let runs = Arc::new(AtomicU32::new(0));
    let run = Arc::clone(&runs);
    // The layer itself and nothing around it: what each duplicate costs is what is measured.
    let service = layer.layer(service_fn(move |_: Incoming| {
        run.fetch_add(1, Ordering::SeqCst);
        let mut redis = connection.clone();
        async move {
            while redis.get::<_, Option<usize>>("ready").await? != Some(PROCESSES) {
                sleep(Duration::from_millis(20)).await;
            }
            // At any time within the pauses between two looks.
            sleep(RUN + Duration::from_millis(rand::random_range(0..400))).await;
            let mut response = answer(200, format!("order {}", rand::random::<u64>())).expect("a response");
            response.headers_mut().insert("location", "/orders/1".parse().expect("a value"));
            Ok::<_, redis::RedisError>(response)
        }
    }));
    let deliveries = (0..EACH).map(|_| {
        let mut service = service.clone();
        tokio::spawn(async move {
            let (response, woken) = Wakening::of(service.call(event("e"))).await;
            let answered = micros();
            // Read at once, as a server would: 2,500 that pile up are no matter of the layer's.
            let answer = Answer::read(response.unwrap()).await;
            Told { answer: kept(&answer), is_replayed: answer.is_replayed(), woken, answered }
        })
    });
    let deliveries: Vec<_> = deliveries.collect();
    let (all, all_but_one) = (format!("waiting: {EACH},"), format!("waiting: {},", EACH - 1));
    let waiting = async {
        loop {
            let ledger = format!("{ledger:?}");
            if ledger.contains(&all) || runs.load(Ordering::SeqCst) == 1 && ledger.contains(&all_but_one) {
                break;
            }
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(LONG, waiting).await.expect("they do not wait");
    redis.incr::<_, _, ()>("ready", 1).await.unwrap();
    // What is measured is the layer, not one task that is told 2,500 times.
    while !deliveries.iter().all(JoinHandle::is_finished) {
        sleep(Duration::from_millis(100)).await;
    }
    let told: Vec<Told> = join_all(deliveries).await.into_iter().map(Result::unwrap).collect();
    let report = Report {
        runs: runs.load(Ordering::SeqCst),
        replays: told.iter().filter(|told| told.is_replayed).count(),
        answers: told.iter().map(|told| told.answer).collect(),
        woken: told.iter().map(|told| told.woken).collect(),
        answered: told.iter().map(|told| told.answered).collect(),
        looks: store.looks(),
        hints: store.hints(),
        completed: store.completed(),
    };
    redis.rpush::<_, _, ()>("reports", serde_json::to_string(&report).unwrap()).await.unwrap();
}

/// What every duplicate has to be told, as a number.
fn kept(answer: &Answer) -> u64 {
    let mut hasher = DefaultHasher::new();
    (answer.status, answer.headers.get("location"), &answer.body).hash(&mut hasher);
    hasher.finish()
}

#[tokio::test]
async fn ten_thousand_duplicates_in_four_processes_are_one_run_and_few_looks() {
    let server = RedisServer::start();
    let start = |_| {
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["--exact", "process", "--ignored", "--nocapture"]).env(URL, server.url()).stdout(Stdio::null());
        Process(command.spawn().unwrap())
    };
    let mut processes: Vec<Process> = (0..PROCESSES).map(start).collect();
    let finished = async {
        for process in &mut processes {
            let status = loop {
                match process.0.try_wait().unwrap() {
                    Some(status) => break status,
                    None => sleep(Duration::from_millis(20)).await,
                }
            };
            assert!(status.success());
        }
    };
    timeout(2 * LONG, finished).await.expect("a process does not end");

    let reports: Vec<String> = server.client().await.lrange("reports", 0, -1).await.unwrap();
    let reports: Vec<Report> = reports.iter().map(|report| serde_json::from_str(report).unwrap()).collect();
    assert_eq!(reports.len(), PROCESSES);
    assert_eq!(reports.iter().map(|report| report.runs).sum::<u32>(), 1);
    assert_eq!(reports.iter().map(|report| report.replays).sum::<usize>(), PROCESSES * EACH - 1);
    let answers: BTreeSet<&u64> = reports.iter().flat_map(|report| &report.answers).collect();
    assert_eq!(answers.len(), 1, "{answers:?}");
    let completed = reports.iter().find_map(|report| report.completed).expect("one has run");
    for report in &reports {
        assert_paced(&report.looks);
        let after = report.looks.iter().filter(|look| **look > completed).count();
        assert!(after <= 2, "{after} looks after the end");
        assert_eq!(report.runs == 1, report.looks.len() == 1, "who runs it does not look, who waits does");
    }
    // That all others happen to look on their own in the moment of the end is out of the question.
    assert!(reports.iter().any(|report| report.hints > 0), "nobody was woken");

    for report in &reports {
        let mut answered = report.answered.clone();
        answered.sort_unstable();
        let first = answered[0].saturating_sub(completed);
        let looks = report.looks.len();
        println!("runs {}, looks {looks}, hints {}, first answer {first} us", report.runs, report.hints);
    }
    for (what, times) in [
        ("woken", reports.iter().map(|report| &report.woken).collect::<Vec<_>>()),
        ("answered", reports.iter().map(|report| &report.answered).collect()),
    ] {
        let mut after: Vec<u64> = times.into_iter().flatten().map(|at| at.saturating_sub(completed)).collect();
        after.sort_unstable();
        let [p50, p99] = [50, 99].map(|percent| after[after.len() * percent / 100 - 1]);
        println!("{what} after the end of the run: p50 {p50} us, p99 {p99} us, last {} us", after[after.len() - 1]);
    }
}
