//! What is said of a Redis server that may not keep what it is given.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test panics where it fails")]

mod common;

use std::io;
use std::sync::{Arc, Mutex};

use tower_idempotency::key::header;
use tower_idempotency::{IdempotencyLayer, Ledger, RedisStore};
use tracing_subscriber::fmt::MakeWriter;

use common::app::{App, answer, event};
use common::redis::RedisServer;
use common::until;

/// A log that can be read.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(line)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Log {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

impl Log {
    fn start() -> (Self, tracing::subscriber::DefaultGuard) {
        let log = Self::default();
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(log.clone()).finish();
        (log, tracing::subscriber::set_default(subscriber))
    }

    fn lines(&self, of: &str) -> Vec<String> {
        let log = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        log.lines().filter(|line| line.contains(of)).map(str::to_owned).collect()
    }
}

fn app(store: RedisStore) -> App {
    let layer = IdempotencyLayer::webhook(&Ledger::new(store), header("X-Id"));
    App::new(&layer, |_, _| async { answer(200, "ran") })
}

async fn set(server: &RedisServer, name: &str, value: &str) {
    let () = redis::cmd("CONFIG").arg(&["SET", name, value]).query_async(&mut server.client().await).await.unwrap();
}

#[tokio::test]
async fn a_server_that_evicts_or_persists_nothing_is_warned_of_and_used() {
    let server = RedisServer::start_with(&["--maxmemory", "100mb", "--maxmemory-policy", "volatile-lru"]);
    let (log, _guard) = Log::start();
    assert_eq!(app(server.store()).send(event("e")).await.status, 200);
    until(async || log.lines("may not keep").len() == 2).await;
    assert!(log.lines("volatile-lru")[0].contains("WARN"));
    assert_eq!(log.lines("persists nothing").len(), 1);
}

#[tokio::test]
async fn a_server_that_keeps_what_it_is_given_is_not_spoken_of() {
    let server = RedisServer::start_with(&["--appendonly", "yes", "--maxmemory", "100mb"]);
    let (log, _guard) = Log::start();
    let strict = app(server.store().strict());
    assert_eq!(strict.send(event("e")).await.status, 200);
    assert_eq!(log.lines("Redis server"), [""; 0]);
}

#[tokio::test]
async fn who_is_strict_refuses_until_the_server_is_safe() {
    let server = RedisServer::start_with(&["--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"]);
    let strict = app(server.store().strict());
    for n in 0..5 {
        let refused = strict.send(event(&n.to_string())).await;
        assert_eq!((refused.status.as_u16(), refused.code().as_deref()), (503, Some("store_unavailable")));
    }
    set(&server, "maxmemory-policy", "noeviction").await;
    set(&server, "save", "3600 1").await;
    assert_eq!(strict.send(event("snapshots")).await.status, 503, "a crash would lose what came since the last one");
    set(&server, "appendonly", "yes").await;
    until(async || strict.send(event("e")).await.status == 200).await;
    assert_eq!(strict.runs(), 1);
}

#[tokio::test]
async fn what_a_limited_user_may_not_see_is_unknown_and_no_error() {
    let server = RedisServer::start();
    let mut acl = redis::cmd("ACL");
    acl.arg(&["SETUSER", "app", "on", ">secret", "~*", "&*", "+@all", "-info", "-config"]);
    let () = acl.query_async(&mut server.client().await).await.unwrap();
    let url = format!("redis://app:secret@127.0.0.1:{}/", server.port());
    let (log, _guard) = Log::start();
    let strict = app(RedisStore::new(&url).unwrap().strict());
    assert_eq!(strict.send(event("e")).await.status, 200);
    let unknown = log.lines("not looked at whole");
    assert_eq!(unknown.len(), 3, "{unknown:?}");
    assert!(unknown.iter().all(|line| line.contains("INFO")));

    // One of the two rights is enough, and this is the other.
    let mut acl = redis::cmd("ACL");
    acl.arg(&["SETUSER", "app", "+info"]);
    let () = acl.query_async(&mut server.client().await).await.unwrap();
    let strict = app(RedisStore::new(&url).unwrap().strict());
    assert_eq!(strict.send(event("e")).await.status, 503, "it is seen to keep no log");
    let mut acl = redis::cmd("ACL");
    acl.arg(&["SETUSER", "app", "-info"]);
    let () = acl.query_async(&mut server.client().await).await.unwrap();

    let mut acl = redis::cmd("ACL");
    acl.arg(&["SETUSER", "app", "+config|get"]);
    let () = acl.query_async(&mut server.client().await).await.unwrap();
    let strict = app(RedisStore::new(&url).unwrap().strict());
    assert_eq!(strict.send(event("e")).await.status, 503, "it is seen to persist nothing");
}
