//! An attempt is polled by its caller until that leaves, or it takes long. Nothing may depend on which of them it is.

#![allow(clippy::unwrap_used, reason = "a test panics where it fails")]

mod common;

use std::future::{pending, poll_fn};
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;
use std::thread;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::oneshot;
use tokio::task::try_id;
use tokio::time::{sleep, timeout};
use tower::limit::ConcurrencyLimit;
use tower::{Layer as _, ServiceExt as _, service_fn};
use tower_idempotency::key::header;
use tower_idempotency::store::State;
use tower_idempotency::{IdempotencyLayer, Ledger, MemoryStore, SqliteStore};

use self::common::app::{Answer, App, Incoming, answer, attempt, event};
use self::common::scratch::Scratch;
use self::common::stores::{Fault, Step, Stores};

/// It is renewed by a task from the start.
const LEASE: Duration = Duration::from_millis(300);

/// It is not, but only when its attempt has taken long.
const LONG_LEASE: Duration = Duration::from_secs(1);

fn layer(ledger: &Ledger) -> IdempotencyLayer {
    leased(ledger, LEASE)
}

fn leased(ledger: &Ledger, lease: Duration) -> IdempotencyLayer {
    IdempotencyLayer::webhook(ledger, header("X-Id")).lease(lease).patience(Duration::ZERO)
}

/// Works for so long.
fn working(ledger: &Ledger, time: Duration) -> App {
    working_under(ledger, LEASE, time)
}

fn working_under(ledger: &Ledger, lease: Duration, time: Duration) -> App {
    App::new(&leased(ledger, lease), move |_, run| async move {
        sleep(time).await;
        answer(200, format!("run {run}"))
    })
}

/// Blocks its thread for so long, from the first poll on.
fn blocking(ledger: &Ledger, lease: Duration, time: Duration) -> App {
    App::new(&leased(ledger, lease), move |_, run| {
        thread::sleep(time);
        async move { answer(200, format!("run {run}")) }
    })
}

/// Another process on the same store.
fn rival(store: &MemoryStore) -> App {
    working(&Ledger::new(store.clone()), Duration::ZERO)
}

/// Polls a delivery until it can go no further for the moment.
async fn begin(delivery: &mut BoxFuture<'static, Answer>) {
    let ended = poll_fn(|cx| Poll::Ready(delivery.as_mut().poll(cx).is_ready())).await;
    assert!(!ended, "it has ended");
}

fn current_thread() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

fn multi_thread() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

#[tokio::test(start_paused = true)]
async fn one_that_is_short_stays_with_its_caller_and_one_that_is_long_does_not() {
    for (time, stays) in [(Duration::from_millis(50), true), (Duration::from_secs(1), false)] {
        let (told, handled_by) = oneshot::channel();
        let told = std::sync::Arc::new(std::sync::Mutex::new(Some(told)));
        let app = App::new(&layer(&Ledger::new(MemoryStore::new())), move |_, _| {
            let told = told.lock().unwrap().take();
            async move {
                sleep(time).await;
                told.unwrap().send(try_id()).unwrap();
                answer(200, "done")
            }
        });
        let caller = tokio::spawn(async move { (try_id(), app.send(event("e")).await) });
        let (caller, answer) = caller.await.unwrap();
        assert_eq!(answer.body, "done");
        assert_eq!(caller == handled_by.await.unwrap(), stays, "{time:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn one_that_nobody_polls_ends_all_the_same() {
    let store = MemoryStore::new();
    let ledger = Ledger::new(store.clone());
    let app = App::new(&layer(&ledger), |request, _| async move {
        let key = attempt(&request).key();
        sleep(Duration::from_millis(1)).await;
        answer(200, key.to_string())
    });
    let mut held = app.send(event("e")).boxed();
    begin(&mut held).await;
    sleep(Duration::from_secs(1)).await;
    let told = rival(&store).send(event("e")).await;
    assert!(told.is_replayed());
    // It takes no place while its caller still has it.
    assert_eq!(ledger.in_flight(), 0);
    ledger.drain(Duration::ZERO).await.unwrap();
    let key = std::str::from_utf8(&told.body).unwrap().parse().unwrap();
    assert!(matches!(ledger.lookup(&key).await.unwrap().unwrap().state, State::Done(_)));
    assert_eq!(held.await.body, told.body);
}

#[tokio::test(start_paused = true)]
async fn one_that_nobody_polls_keeps_its_lease() {
    let store = MemoryStore::new();
    let mut held = working(&Ledger::new(store.clone()), LEASE * 10).send(event("e"));
    begin(&mut held).await;
    for _ in 0..9 {
        sleep(LEASE).await;
        assert_eq!(rival(&store).send(event("e")).await.code().as_deref(), Some("running"));
    }
    assert_eq!(held.await.body, "run 1");
}

#[tokio::test(start_paused = true)]
async fn one_that_takes_for_ever_is_renewed_for_a_month() {
    let (stores, day) = (Stores::memory(), Duration::from_secs(24 * 60 * 60));
    let layer = leased(&stores.ledger(), day).max_attempt(Duration::MAX);
    let app = App::new(&layer, |_, _| pending());
    let running = tokio::spawn(app.send(event("e")));
    sleep(day * 60).await;
    let renewals = stores.calls(Step::Renew);
    assert!((30 * 3..30 * 4).contains(&renewals), "{renewals}");
    running.abort();
}

/// Its caller was not polled for so long, as where the answer to its claim waits for a thread that is blocked.
#[tokio::test(start_paused = true)]
async fn one_that_learns_of_its_claim_when_that_is_over_runs_if_nobody_else_has() {
    for others_take in [None, Some(LEASE * 2), Some(Duration::ZERO)] {
        let stores = Stores::memory();
        let [app, other] =
            [Duration::ZERO, others_take.unwrap_or_default()].map(|time| working(&stores.ledger(), time));
        stores.fail(Step::Claim, Fault::DelayAnswer, 1);
        let mut held = app.send(event("e")).boxed();
        begin(&mut held).await;
        sleep(LEASE * 2).await;
        let others = others_take.map(|_| tokio::spawn(other.send(event("e"))));
        sleep(LEASE / 2).await;
        let told = held.await;
        match others_take {
            None => assert_eq!((&*told.body, told.is_replayed()), (&b"run 1"[..], false)),
            Some(Duration::ZERO) => assert!(told.is_replayed()),
            Some(_) => assert_eq!(told.code().as_deref(), Some("running")),
        }
        if let Some(others) = others {
            assert_eq!(others.await.unwrap().body, "run 1");
        }
        assert_eq!(app.runs() + other.runs(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn one_that_learns_too_late_of_its_claim_does_not_wait_for_a_store_that_is_silent_by_then() {
    let (stores, lease) = (Stores::memory(), Duration::from_secs(20));
    let [app, other] = [(); 2].map(|()| working_under(&stores.ledger(), lease, lease));
    stores.fail(Step::Claim, Fault::DelayAnswer, 1);
    let mut held = app.send(event("e")).boxed();
    begin(&mut held).await;
    sleep(lease * 2).await;
    let others = tokio::spawn(other.send(event("e")));
    sleep(lease / 2).await;
    stores.fail(Step::Release, Fault::Hang, u32::MAX);
    let told = timeout(Duration::from_secs(1), held).await.expect("an answer in time");
    assert_eq!(told.code().as_deref(), Some("running"));
    assert_eq!(others.await.unwrap().body, "run 1");
}

/// Each claim was in time, but not both of them together.
#[tokio::test(start_paused = true)]
async fn one_whose_first_claim_is_over_when_it_has_its_second_does_not_run_beside_another() {
    let [old, new] = ["the secret of last year", "the secret of this year"];
    let stores = Stores::memory();
    let app = App::new(&layer(&stores.ledger()).secret(new).previous_secret(old), |_, _| async { answer(200, "") });
    let others = App::new(&layer(&stores.ledger()).secret(old), |_, _| async { answer(200, "the other") });
    stores.fail(Step::Claim, Fault::DelayAnswer, 2);
    let mut held = app.send(event("e")).boxed();
    begin(&mut held).await;
    sleep(LEASE * 2 / 3).await;
    begin(&mut held).await;
    sleep(LEASE * 2 / 3).await;
    stores.heal();
    assert_eq!(others.send(event("e")).await.body, "the other");
    let told = held.await;
    assert_eq!((&*told.body, app.runs()), (&b"the other"[..], 0));
}

/// Nor where it is told so late that it has lost.
#[tokio::test(start_paused = true)]
async fn one_whose_store_was_away_while_its_service_was_not_ready_does_not_run_beside_another() {
    let stores = Stores::memory();
    let runs = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&runs);
    let one_at_a_time = ConcurrencyLimit::new(
        service_fn(move |_: Incoming| {
            counted.fetch_add(1, Ordering::Relaxed);
            async {
                sleep(LEASE * 5).await;
                answer(200, "done")
            }
        }),
        1,
    );
    let service = layer(&stores.ledger()).layer(one_at_a_time);
    let before = tokio::spawn(service.clone().oneshot(event("before")));
    sleep(LEASE / 10).await;
    let waits = tokio::spawn(service.oneshot(event("e")));
    sleep(LEASE / 10).await;
    stores.fail(Step::Renew, Fault::LoseRequest, u32::MAX);
    sleep(LEASE * 2).await;
    let other = working(&stores.ledger(), Duration::ZERO);
    assert_eq!(other.send(event("e")).await.body, "run 1");
    assert_eq!(waits.await.unwrap().unwrap().status(), 503);
    assert_eq!(before.await.unwrap().unwrap().status(), 200);
    assert_eq!((runs.load(Ordering::Relaxed), other.runs()), (1, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_blocks_its_thread_from_the_first_poll_on_keeps_its_lease() {
    for lease in [LEASE, LONG_LEASE] {
        let store = MemoryStore::new();
        let app = blocking(&Ledger::new(store.clone()), lease, lease * 4);
        let blocking = tokio::spawn(app.send(event("e")));
        // Not by the runtime, of which one thread is blocked.
        tokio::task::block_in_place(|| thread::sleep(lease * 3));
        assert_eq!(rival(&store).send(event("e")).await.code().as_deref(), Some("running"));
        assert_eq!(blocking.await.unwrap().body, "run 1");
    }
}

/// Another one, a moment before, leaves a thread of the runtime that looks after timers.
#[test]
fn one_that_blocks_its_thread_soon_after_another_keeps_its_lease() {
    for (workers, lease) in [(2, LEASE), (4, LEASE), (2, LONG_LEASE), (4, LONG_LEASE)] {
        let store = MemoryStore::new();
        let ledger = Ledger::new(store.clone());
        let runtime = Builder::new_multi_thread().worker_threads(workers).enable_all().build().unwrap();
        let before = working(&ledger, Duration::ZERO);
        runtime.spawn(async move { before.send(event("before")).await });
        thread::sleep(Duration::from_millis(20));
        let blocks = blocking(&ledger, lease, lease * 4);
        assert_blocked_keeps_its_lease(&runtime, &store, blocks, lease * 2);
    }
}

/// When it is woken, nobody else is awake.
#[test]
fn one_that_blocks_its_thread_after_it_waited_keeps_its_lease() {
    for (workers, lease) in [(2, LEASE), (4, LEASE), (2, LONG_LEASE), (4, LONG_LEASE)] {
        let store = MemoryStore::new();
        let runtime = Builder::new_multi_thread().worker_threads(workers).enable_all().build().unwrap();
        let blocks = App::new(&leased(&Ledger::new(store.clone()), lease), move |_, run| async move {
            sleep(Duration::from_millis(250)).await;
            thread::sleep(lease * 4);
            answer(200, format!("run {run}"))
        });
        assert_blocked_keeps_its_lease(&runtime, &store, blocks, lease * 2 + Duration::from_millis(250));
    }
}

fn assert_blocked_keeps_its_lease(runtime: &Runtime, store: &MemoryStore, blocks: App, time: Duration) {
    let blocking = runtime.spawn(async move { blocks.send(event("e")).await });
    thread::sleep(time);
    let other = current_thread();
    let told = other.block_on(rival(store).send(event("e")));
    let workers = runtime.metrics().num_workers();
    assert_eq!(told.code().as_deref(), Some("running"), "{workers} workers, after {time:?}");
    assert_eq!(runtime.block_on(blocking).unwrap().body, "run 1");
}

/// What a timer wakes may wait for the thread that saw to the timer, from which no other takes it, and that thread may take a task from
/// outside first, which blocks it. Were it a task that looks after alarms, all leases would be lost; and it may be another's renewal.
#[test]
fn one_that_blocks_its_thread_takes_no_lease_from_another() {
    let alarm = Duration::from_millis(100);
    let renewal = Duration::from_millis(260);
    for (time, busy) in [(alarm, 12), (alarm, 16), (renewal, 86), (renewal, 90), (renewal, 100)] {
        let store = MemoryStore::new();
        let ledger = Ledger::new(store.clone());
        let runtime = Builder::new_multi_thread()
            .worker_threads(3)
            .event_interval(1)
            .global_queue_interval(1)
            .enable_all()
            .build()
            .unwrap();
        let waits = working_under(&ledger, LONG_LEASE, LONG_LEASE * 3);
        let blocks = blocking(&ledger, LONG_LEASE, LONG_LEASE * 3);
        let waiting = runtime.spawn(async move { waits.send(event("waits")).await });
        // All threads are busy when it is time for the first, and one then takes the second.
        thread::sleep(time - Duration::from_millis(5));
        for busy in [busy, busy + 4, busy + 8].map(Duration::from_millis) {
            runtime.spawn(async move { thread::sleep(busy) });
        }
        thread::sleep(Duration::from_millis(3));
        let blocking = runtime.spawn(async move { blocks.send(event("blocks")).await });
        thread::sleep(LONG_LEASE * 3 / 2);
        let other = current_thread();
        for key in ["waits", "blocks"] {
            let told = other.block_on(rival(&store).send(event(key)));
            assert_eq!(told.code().as_deref(), Some("running"), "{key}, after {time:?} and {busy} ms");
        }
        for attempt in [waiting, blocking] {
            assert_eq!(runtime.block_on(attempt).unwrap().body, "run 1");
        }
    }
}

async fn on_file(dir: &Path) -> Ledger {
    Ledger::new(SqliteStore::open(dir.join("store.db")).await.unwrap())
}

/// Another process on the same file is told that it runs.
fn assert_runs_for_a_rival(dir: &Path, key: &str) {
    let told = current_thread().block_on(async { working(&on_file(dir).await, Duration::ZERO).send(event(key)).await });
    assert_eq!(told.code().as_deref(), Some("running"));
}

/// Its pool takes a connection back in a task, which a claim leaves behind and a renewal needs.
#[test]
fn one_that_blocks_its_thread_leaves_its_store_what_that_has_to_do() {
    let (dir, lease) = (Scratch::new(), LONG_LEASE);
    let runtime = multi_thread();
    let ledger = runtime.block_on(on_file(dir.path()));
    let blocks = blocking(&ledger, lease, lease * 3);
    let blocking = runtime.spawn(async move { blocks.send(event("blocks")).await });
    thread::sleep(lease / 2);
    let other = working(&ledger, Duration::ZERO);
    let meanwhile = runtime.spawn(async move { other.send(event("meanwhile")).await });
    thread::sleep(lease * 3 / 2);
    assert_runs_for_a_rival(dir.path(), "blocks");
    for attempt in [meanwhile, blocking] {
        assert_eq!(runtime.block_on(attempt).unwrap().body, "run 1");
    }
}

/// It takes its connection back in a task after every call.
#[test]
fn a_thread_that_is_blocked_after_a_call_takes_no_connection_from_the_store() {
    let (dir, lease) = (Scratch::new(), LONG_LEASE);
    let runtime = multi_thread();
    let ledger = runtime.block_on(on_file(dir.path()));
    let [waits, quick] = [lease * 3, Duration::ZERO].map(|time| working_under(&ledger, lease, time));
    let waiting = runtime.spawn(async move { waits.send(event("waits")).await });
    thread::sleep(lease / 20);
    let blocked = runtime.spawn(async move {
        quick.send(event("quick")).await;
        thread::sleep(lease * 2);
    });
    thread::sleep(lease * 3 / 2);
    assert_runs_for_a_rival(dir.path(), "waits");
    assert_eq!(runtime.block_on(waiting).unwrap().body, "run 1");
    runtime.block_on(blocked).unwrap();
}

/// Its renewals hold what whoever drains waits for.
#[test]
fn one_whose_caller_blocks_a_thread_after_its_answer_is_over() {
    let runtime = multi_thread();
    let ledger = Ledger::new(MemoryStore::new());
    let app = working(&ledger, Duration::ZERO);
    let caller = runtime.spawn(async move {
        app.send(event("e")).await;
        thread::sleep(LONG_LEASE);
    });
    thread::sleep(LONG_LEASE / 2);
    current_thread().block_on(ledger.drain(LONG_LEASE / 4)).unwrap();
    runtime.block_on(caller).unwrap();
}

/// What it holds goes with its runtime, in whatever time that takes.
#[test]
fn one_that_ends_with_its_runtime_holds_up_no_other() {
    struct Slow(Duration);
    impl Drop for Slow {
        fn drop(&mut self) {
            thread::sleep(self.0);
        }
    }

    let (ends, lease) = (multi_thread(), LONG_LEASE);
    let holds = App::new(&leased(&Ledger::new(MemoryStore::new()), lease), move |_, run| async move {
        let _slow = Slow(lease * 4);
        pending::<()>().await;
        answer(200, format!("run {run}"))
    });
    let mut held = holds.send(event("e"));
    ends.block_on(begin(&mut held));
    drop(ends);
    // By then its alarm has gone off.
    thread::sleep(Duration::from_millis(250));
    let store = MemoryStore::new();
    let runtime = multi_thread();
    let blocks = blocking(&Ledger::new(store.clone()), lease, lease * 3);
    assert_blocked_keeps_its_lease(&runtime, &store, blocks, lease * 2);
    assert_eq!(runtime.block_on(held).status, 503);
}

/// Nobody else has anything to do in either.
#[test]
fn a_runtime_is_woken_only_as_long_as_a_lease_is_renewed_in_it() {
    let ledger = Ledger::new(MemoryStore::new());
    let (idle, busy) = (multi_thread(), multi_thread());
    let parked = |runtime: &Runtime| {
        let metrics = runtime.metrics();
        (0..metrics.num_workers()).map(|worker| metrics.worker_park_count(worker)).sum::<u64>()
    };
    idle.block_on(working(&ledger, Duration::ZERO).send(event("has been")));
    let mut hangs = working(&ledger, LEASE * 100).send(event("hangs"));
    busy.block_on(begin(&mut hangs));
    thread::sleep(Duration::from_millis(200));
    let before = [&idle, &busy].map(parked);
    thread::sleep(Duration::from_secs(1));
    let after = [&idle, &busy].map(parked);
    assert_eq!(after[0], before[0], "the idle one was woken");
    // Twenty times a second, and some more for renewals.
    assert!(after[1] > before[1] + 10, "{before:?} before, {after:?} after");
}

/// As long as its ledger has an attempt elsewhere.
#[cfg(target_os = "linux")]
#[test]
fn a_runtime_that_has_ended_leaves_no_descriptors() {
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let ledger = Ledger::new(MemoryStore::new());
    let lasting = multi_thread();
    let mut hanging = working(&ledger, LEASE * 100).send(event("hangs"));
    lasting.block_on(begin(&mut hanging));
    let before = open();
    for n in 0..100 {
        let delivery = working(&ledger, Duration::ZERO).send(event(&n.to_string()));
        multi_thread().block_on(delivery);
    }
    thread::sleep(Duration::from_millis(500));
    let after = open();
    // Other tests open some of their own meanwhile; each of these would leave four.
    assert!(after < before + 200, "{before} before, {after} after");
}

#[test]
fn one_whose_caller_is_polled_in_a_runtime_without_timers_is_kept() {
    let store = MemoryStore::new();
    let runtime = multi_thread();
    let app = App::new(&layer(&Ledger::new(store.clone())), |_, run| async move {
        tokio::task::yield_now().await;
        answer(200, format!("run {run}"))
    });
    let mut delivery = app.send(event("e"));
    runtime.block_on(begin(&mut delivery));
    let elsewhere = Builder::new_current_thread().build().unwrap();
    assert_eq!(elsewhere.block_on(delivery).body, "run 1");
    assert!(runtime.block_on(rival(&store).send(event("e"))).is_replayed());
}

#[test]
fn none_starts_in_a_runtime_without_timers() {
    let store = MemoryStore::new();
    let app = working(&Ledger::new(store.clone()), Duration::ZERO);
    let without_timers = Builder::new_current_thread().build().unwrap();
    let delivery = app.send(event("e"));
    let panicked = thread::spawn(move || without_timers.block_on(delivery)).join().is_err();
    assert!(panicked, "it was answered");
    assert_eq!(app.runs(), 0);
    let runtime = multi_thread();
    assert_eq!(runtime.block_on(rival(&store).send(event("e"))).body, "run 1");
}

#[test]
fn one_whose_caller_is_dropped_outside_of_a_runtime_goes_on() {
    let store = MemoryStore::new();
    let runtime = multi_thread();
    let app = working(&Ledger::new(store.clone()), Duration::from_millis(50));
    let mut delivery = app.send(event("e"));
    runtime.block_on(begin(&mut delivery));
    drop(delivery);
    runtime.block_on(async {
        let retry = rival(&store);
        while !retry.send(event("e")).await.is_replayed() {
            sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(retry.runs(), 0);
    });
}

/// Both have attempts of one ledger.
#[test]
fn a_runtime_that_is_blocked_takes_no_lease_from_attempts_in_another() {
    let store = MemoryStore::new();
    let ledger = Ledger::new(store.clone());
    let (blocked, other) = (current_thread(), multi_thread());
    let mut blocking = working(&ledger, LEASE).send(event("of the blocked"));
    blocked.block_on(begin(&mut blocking));
    other.block_on(async {
        let mut held = working(&ledger, LEASE * 5).send(event("of the other"));
        begin(&mut held).await;
        sleep(LEASE * 2 / 3).await;
        // Whoever comes is not looked after by the blocked one.
        working(&ledger, Duration::ZERO).send(event("later")).await;
        sleep(LEASE * 2).await;
        assert_eq!(rival(&store).send(event("of the other")).await.code().as_deref(), Some("running"));
        assert_eq!(held.await.body, "run 1");
    });
    blocked.block_on(async { assert_eq!(blocking.await.body, "run 1") });
}

#[test]
fn the_end_of_a_runtime_takes_no_lease_from_attempts_in_another() {
    let store = MemoryStore::new();
    let ledger = Ledger::new(store.clone());
    let (first, second) = (multi_thread(), multi_thread());
    let mut ends = working(&ledger, LEASE * 10).send(event("of the first"));
    first.block_on(begin(&mut ends));
    let mut goes_on = working(&ledger, LEASE * 10).send(event("of the second"));
    second.block_on(begin(&mut goes_on));
    drop(first);
    second.block_on(async {
        let goes_on = tokio::spawn(goes_on);
        sleep(LEASE * 3).await;
        assert_eq!(rival(&store).send(event("of the second")).await.code().as_deref(), Some("running"));
        assert_eq!(goes_on.await.unwrap().body, "run 1");
        // With its runtime that attempt has ended, and its lease is over.
        assert_eq!(rival(&store).send(event("of the first")).await.body, "run 1");
        assert_eq!(ends.await.status, 503);
    });
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_stays_gets_what_its_attempt_answers_after_it_was_moved() {
    let app = working(&Ledger::new(MemoryStore::new()), Duration::from_secs(10));
    let mut delivery = pin!(app.send(event("e")));
    assert!(delivery.as_mut().now_or_never().is_none());
    assert_eq!(delivery.await.body, "run 1");
}
