//! The layer over the memory store, in every order that chance comes upon.
//!
//! [shuttle](https://docs.rs/shuttle) runs all tasks of a test on one thread, and decides who comes next wherever a lock of this
//! crate is taken, a count is changed or a task waits. Time passes where one of the tasks lets it. `tests/run` runs these
//! after the other tests, and `tests/shuttle` says how to run them alone.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test panics where it fails")]

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, join_all, select};
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use shuttle::future::{JoinHandle, block_on, spawn, yield_now};
use shuttle::rand::{Rng as _, RngCore as _, thread_rng};
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::{Config, Runner};
use tokio::runtime::{Builder, Runtime};
use tokio::time::advance;
use tower::util::BoxCloneSyncService;
use tower::{Layer as _, Service as _, service_fn};

use crate::key::{Key, header};
use crate::store::{Claim, Claimed, Entry, Forgotten, Hold, Store, StoreError};
use crate::sync::atomic::{AtomicU32, Ordering};
use crate::{IdempotencyLayer, Ledger, MemoryStore, RequestBody, ResponseBody};

pub(crate) const LONG: Duration = Duration::from_secs(3600);
pub(crate) const SHORT: Duration = Duration::from_millis(40);

/// How many orders of each kind are tried, and how many tasks are held up in those of the second.
const ORDERS: usize = 300;
const HELD_UP: usize = 3;

const DELIVERIES: u32 = 4;

/// Runs a test in one order after the other, on a clock that stands still.
pub(crate) fn in_any_order(test: fn(Arc<Runtime>) -> BoxFuture<'static, ()>) {
    in_orders(ORDERS, test);
}

/// The same, for a test of few steps that has to go wrong in several places at once.
pub(crate) fn in_many_orders(test: fn(Arc<Runtime>) -> BoxFuture<'static, ()>) {
    in_orders(15 * ORDERS, test);
}

fn in_orders(orders: usize, test: fn(Arc<Runtime>) -> BoxFuture<'static, ()>) {
    let clock = Arc::new(Builder::new_current_thread().enable_time().start_paused(true).build().unwrap());
    let _context = clock.enter();
    let run = {
        let clock = Arc::clone(&clock);
        move || block_on(test(Arc::clone(&clock)))
    };
    Runner::new(RandomScheduler::new(orders), config()).run(run.clone());
    Runner::new(PctScheduler::new(HELD_UP, orders), config()).run(run);
}

fn config() -> Config {
    let mut config = Config::new();
    // The futures of the layer are larger than what it takes for a task.
    config.stack_size = 1 << 20;
    config
}

/// Lets time pass as long as the test goes on.
pub(crate) fn pass_time(clock: Arc<Runtime>) {
    let passing = async move {
        loop {
            yield_now().await;
            clock.block_on(advance(Duration::from_millis(thread_rng().gen_range(0..20))));
        }
    };
    drop(spawn(passing));
}

/// A process with the layer.
#[derive(Clone)]
struct Process {
    ledger: Ledger,
    service: Service,
    handler: Arc<Handler>,
}

/// A store that is a way off: others get their turn while a step is on its way there and back.
#[derive(Clone, Default)]
struct Remote(MemoryStore);

/// Works for a moment, fails as often as it is told to, and answers differently each time.
#[derive(Default)]
struct Handler {
    failures: u32,
    runs: AtomicU32,
    running: AtomicU32,
    most_running: AtomicU32,
}

type Service = BoxCloneSyncService<Request<Full<Bytes>>, Response<ResponseBody<Full<Bytes>>>, Infallible>;

/// The status and body of an answer.
type Told = (u16, Bytes);

// === impl Process ===

impl Process {
    fn new(ledger: Ledger, lease: Duration, failures: u32) -> Self {
        let handler = Arc::new(Handler { failures, ..Handler::default() });
        let run = Arc::clone(&handler);
        let service = service_fn(move |_: Request<RequestBody<Full<Bytes>>>| Arc::clone(&run).run());
        let layer = IdempotencyLayer::webhook(&ledger, header("x-id")).lease(lease).patience(LONG);
        Self { ledger, service: BoxCloneSyncService::new(layer.layer(service)), handler }
    }

    fn deliver(&self, id: &str) -> BoxFuture<'static, Told> {
        let request = Request::post("/").header("x-id", id).body(Full::default()).unwrap();
        let response = self.service.clone().call(request);
        async {
            let (head, body) = response.await.unwrap().into_parts();
            (head.status.as_u16(), body.collect().await.unwrap().to_bytes())
        }
        .boxed()
    }

    /// Starts to deliver one event several times.
    fn deliver_all(&self) -> Vec<JoinHandle<Told>> {
        (0..DELIVERIES).map(|_| spawn(self.deliver("event"))).collect()
    }

    fn runs(&self) -> u32 {
        self.handler.runs.load(Ordering::SeqCst)
    }

    /// When all that was started has come to its end, nothing is left of it.
    async fn ends_clean(&self) {
        self.ledger.drain(LONG).await.unwrap();
        assert_eq!((self.ledger.in_flight(), self.ledger.waiting()), (0, 0));
        assert!(self.ledger.flights().is_empty(), "a flight is left");
    }
}

// === impl Remote ===

impl Remote {
    async fn call<T>(&self, step: impl Future<Output = T>) -> T {
        yield_now().await;
        let answer = step.await;
        yield_now().await;
        answer
    }
}

impl Store for Remote {
    async fn claim(&self, key: &Key, claim: &Claim) -> Result<Claimed, StoreError> {
        self.call(self.0.claim(key, claim)).await
    }

    async fn renew(&self, key: &Key, claim: &Claim) -> Result<Hold, StoreError> {
        self.call(self.0.renew(key, claim)).await
    }

    async fn complete(&self, key: &Key, claim: &Claim, record: Bytes) -> Result<Hold, StoreError> {
        self.call(self.0.complete(key, claim, record)).await
    }

    async fn release(&self, key: &Key, claim: &Claim, remember: Duration) -> Result<Hold, StoreError> {
        self.call(self.0.release(key, claim, remember)).await
    }

    async fn lookup(&self, key: &Key) -> Result<Option<Entry>, StoreError> {
        self.call(self.0.lookup(key)).await
    }

    async fn forget(&self, key: &Key, force: bool) -> Result<Forgotten, StoreError> {
        self.call(self.0.forget(key, force)).await
    }

    fn failure_domain(&self, key: &Key) -> u16 {
        self.0.failure_domain(key)
    }

    async fn changed(&self, key: &Key) {
        self.call(self.0.changed(key)).await;
    }
}

// === impl Handler ===

impl Handler {
    async fn run(self: Arc<Self>) -> Result<Response<Full<Bytes>>, Infallible> {
        let run = self.runs.fetch_add(1, Ordering::SeqCst) + 1;
        let running = self.running.fetch_add(1, Ordering::SeqCst) + 1;
        self.most_running.fetch_max(running, Ordering::SeqCst);
        yield_now().await;
        self.running.fetch_sub(1, Ordering::SeqCst);
        let status = if run <= self.failures { 500 } else { 200 };
        let body = Full::from(format!("{:x}", thread_rng().next_u64()));
        Ok(Response::builder().status(status).body(body).unwrap())
    }
}

async fn all<T: 'static>(tasks: Vec<JoinHandle<T>>) -> Vec<T> {
    join_all(tasks).await.into_iter().map(Result::unwrap).collect()
}

fn told(answers: &[Told], status: u16) -> u32 {
    answers.iter().filter(|(told, _)| *told == status).count() as u32
}

/// All who are told that it is done are told the same.
fn agree(answers: &[Told]) {
    let outcomes: BTreeSet<&Bytes> =
        answers.iter().filter(|(status, _)| *status == 200).map(|(_, body)| body).collect();
    assert!(outcomes.len() <= 1, "{answers:?}");
}

#[test]
fn deliveries_of_one_event_are_one_run_and_are_told_the_same() {
    in_any_order(|_| {
        async {
            let process = Process::new(Ledger::new(Remote::default()), LONG, 0);
            let answers = all(process.deliver_all()).await;
            assert_eq!((process.runs(), told(&answers, 200)), (1, DELIVERIES));
            agree(&answers);
            process.ends_clean().await;
        }
        .boxed()
    });
}

#[test]
fn one_of_those_who_wait_takes_over_from_an_attempt_that_failed() {
    in_any_order(|_| {
        async {
            let process = Process::new(Ledger::new(Remote::default()), LONG, 1);
            let answers = all(process.deliver_all()).await;
            assert_eq!((process.runs(), told(&answers, 500), told(&answers, 200)), (2, 1, DELIVERIES - 1));
            agree(&answers);
            process.ends_clean().await;
        }
        .boxed()
    });
}

/// Also where there is a place for one alone, which the attempt that failed has had.
#[test]
fn whoever_takes_over_has_a_place() {
    in_any_order(|_| {
        async {
            let process = Process::new(Ledger::new(Remote::default()).max_in_flight(1), LONG, 1);
            let answers = all(process.deliver_all()).await;
            assert_eq!((process.runs(), told(&answers, 500), told(&answers, 200)), (2, 1, DELIVERIES - 1));
            process.ends_clean().await;
        }
        .boxed()
    });
}

#[test]
fn nobody_is_told_that_it_is_done_when_every_attempt_fails() {
    in_any_order(|_| {
        async {
            let process = Process::new(Ledger::new(Remote::default()), LONG, u32::MAX);
            let answers = all(process.deliver_all()).await;
            assert_eq!(told(&answers, 500), process.runs());
            assert_eq!(told(&answers, 500) + told(&answers, 503), DELIVERIES);
            process.ends_clean().await;
        }
        .boxed()
    });
}

#[test]
fn clients_that_leave_cost_nobody_an_answer_and_leave_nothing_behind() {
    in_any_order(|clock| {
        async {
            let process = Process::new(Ledger::new(Remote::default()), LONG, 0);
            pass_time(clock);
            let leaving = (0..DELIVERIES).map(|_| {
                let delivery = process.deliver("event");
                spawn(async move {
                    let leave = async {
                        for _ in 0..thread_rng().gen_range(0..4) {
                            yield_now().await;
                        }
                    };
                    drop(select(delivery, pin!(leave)).await);
                })
            });
            all(leaving.collect()).await;
            assert_eq!((process.deliver("event").await.0, process.runs()), (200, 1));
            process.ends_clean().await;
        }
        .boxed()
    });
}

/// A lease may be over before its attempt gets to renew it, so an event may run more than once. It has one outcome.
#[test]
fn processes_whose_leases_run_out_tell_one_outcome() {
    static RUN_AGAIN: AtomicBool = AtomicBool::new(false);
    in_any_order(|clock| {
        async {
            let store = Remote::default();
            pass_time(clock);
            let processes = [(); 2].map(|()| Process::new(Ledger::new(store.clone()), SHORT, 0));
            let deliveries = processes.iter().flat_map(|process| [process.deliver("event"), process.deliver("event")]);
            let answers = all(deliveries.map(spawn).collect()).await;
            assert_eq!(told(&answers, 200) + told(&answers, 503), DELIVERIES);
            agree(&[answers, vec![processes[0].deliver("event").await]].concat());
            RUN_AGAIN.fetch_or(processes.iter().map(Process::runs).sum::<u32>() > 1, Relaxed);
            for process in processes {
                process.ends_clean().await;
            }
        }
        .boxed()
    });
    assert!(RUN_AGAIN.load(Relaxed), "no lease has run out");
}

#[test]
fn nothing_starts_when_a_process_has_drained() {
    in_any_order(|_| {
        async {
            let process = Process::new(Ledger::new(Remote::default()), LONG, 1);
            let deliveries = process.deliver_all();
            process.ledger.drain(LONG).await.unwrap();
            let runs = process.runs();
            let answers = all(deliveries).await;
            assert_eq!(process.runs(), runs, "{answers:?}");
            agree(&answers);
            process.ends_clean().await;
        }
        .boxed()
    });
}

#[test]
fn no_more_run_at_once_than_may() {
    in_any_order(|_| {
        async {
            let process = Process::new(Ledger::new(Remote::default()).max_in_flight(2), LONG, 0);
            let events = (0..DELIVERIES).map(|n| spawn(process.deliver(&n.to_string())));
            let answers = all(events.collect()).await;
            assert!(process.handler.most_running.load(Ordering::SeqCst) <= 2);
            assert_eq!(told(&answers, 200), process.runs());
            assert_eq!(told(&answers, 200) + told(&answers, 503), DELIVERIES);
            process.ends_clean().await;
        }
        .boxed()
    });
}
