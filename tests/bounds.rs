//! Clients that mean no good, over TCP: what they may hold of a process has bounds, and is given back when they leave.
//!
//! Each test looks at the gauges all the while, the ledger's own and those that Prometheus sees. It can do both at one
//! moment, because its server and its clients share its one thread.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test panics where it fails")]

mod common;

use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use http::Request;
use http_body_util::Full;
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::yield_now;
use tokio::time::{sleep, timeout};
use tower_idempotency::IdempotencyLayer;

use common::metrics::recorder;
use common::server::{LARGE, MAX_GIVEN_UP, MAX_IN_FLIGHT, MAX_OVERDUE, MAX_WAITING, Server};
use common::stores::{Fault, Step, Stores};
use common::until;

/// How many requests a flood is made of, and how many of them are on their way at once.
const FLOOD: usize = 4000;
const AT_ONCE: usize = 64;
/// How long they are left to the server, in turns of the scheduler.
const PAUSES: [usize; 6] = [0, 2, 8, 32, 128, 512];

/// A client that has sent what is said, and reads nothing unless it is told to.
async fn client(server: &Server, head: &str, body: &[u8]) -> TcpStream {
    let mut connection = TcpStream::connect(server.addr).await.unwrap();
    connection.write_all(format!("{head}\r\nhost: localhost\r\n").as_bytes()).await.unwrap();
    connection.write_all(b"\r\n").await.unwrap();
    connection.write_all(body).await.unwrap();
    connection
}

async fn reader(server: &Server, path: &str, id: usize) -> TcpStream {
    client(server, &format!("POST {path} HTTP/1.1\r\nx-id: {id}\r\ncontent-length: 2"), b"{}").await
}

/// The status of what the client is answered.
async fn status(mut connection: TcpStream) -> u16 {
    let mut head = [0; 12];
    timeout(Duration::from_secs(30), connection.read_exact(&mut head)).await.expect("an answer").unwrap();
    std::str::from_utf8(&head[9..]).unwrap().parse().unwrap()
}

#[tokio::test]
async fn readers_that_do_not_read_hold_no_more_than_may_run() {
    let recorder = recorder();
    let _guard = metrics::set_default_local_recorder(&recorder);
    let server = Server::start(&recorder, |layer| layer).await;
    let work = async {
        let slow = join_all((0..MAX_IN_FLIGHT).map(|id| reader(&server, "/large", id))).await;
        until(async || server.ledger.in_flight() == MAX_IN_FLIGHT && server.stalls().await).await;
        assert_eq!(status(reader(&server, "/large", 1000).await).await, 503, "there is no place for another");
        let duplicates = join_all((0..3 * MAX_WAITING).map(|n| reader(&server, "/large", n % MAX_IN_FLIGHT))).await;
        until(async || server.ledger.waiting() == MAX_WAITING).await;
        for refused in join_all(duplicates.into_iter().map(status)).await {
            assert_eq!(refused, 503);
        }
        assert_eq!(server.ledger.in_flight(), MAX_IN_FLIGHT);
        // Who has left is worked for to the end: what was begun leaves a tombstone.
        drop(slow);
        server.is_idle().await;
        for id in 0..MAX_IN_FLIGHT {
            assert_eq!(status(reader(&server, "/large", id).await).await, 200);
        }
    };
    let most = server.watching(work).await;
    assert_eq!((most.running, most.waiting), (MAX_IN_FLIGHT, MAX_WAITING));
    assert!(most.bytes < MAX_IN_FLIGHT * LARGE / 8, "{} bytes were there at once", most.bytes);
    assert_eq!(server.runs().len(), MAX_IN_FLIGHT);
    server.has_run_nothing_twice();
}

#[tokio::test]
async fn readers_that_do_not_read_forever_hold_no_more_than_may_be_overdue() {
    let recorder = recorder();
    let _guard = metrics::set_default_local_recorder(&recorder);
    let server = Server::start(&recorder, |layer| layer.max_attempt(Duration::from_millis(500))).await;
    let work = async {
        let overdue = join_all((0..MAX_OVERDUE).map(|id| reader(&server, "/endless", id))).await;
        until(async || server.overdue() == MAX_OVERDUE && server.ledger.in_flight() == 0).await;
        let running = join_all((100..100 + MAX_IN_FLIGHT).map(|id| reader(&server, "/endless", id))).await;
        until(async || server.ledger.in_flight() == MAX_IN_FLIGHT).await;
        // They would be overdue now, if more might be.
        sleep(Duration::from_secs(1)).await;
        for refused in join_all((200..208).map(|id| reader(&server, "/endless", id))).await {
            assert_eq!(status(refused).await, 503);
        }
        assert_eq!((server.ledger.in_flight(), server.overdue()), (MAX_IN_FLIGHT, MAX_OVERDUE));
        drop((overdue, running));
        server.is_idle().await;
    };
    let most = server.watching(work).await;
    assert_eq!((most.running, most.overdue), (MAX_IN_FLIGHT, MAX_OVERDUE));
    assert!(most.bytes < 16 << 20, "{} bytes were there at once", most.bytes);
    server.has_run_nothing_twice();
}

#[tokio::test]
async fn writers_that_are_slow_are_refused_and_hold_no_place() {
    const WRITERS: usize = 64;
    let recorder = recorder();
    let _guard = metrics::set_default_local_recorder(&recorder);
    let strict = |layer: IdempotencyLayer| layer.body_timeout(Duration::from_secs(1)).max_request_body(1 << 20);
    let server = Server::start(&recorder, strict).await;
    let work = async {
        let slow = async |id: usize| {
            let head = format!("POST /quick HTTP/1.1\r\nx-id: {id}\r\ncontent-length: {}", 1 << 20);
            let mut connection = client(&server, &head, b"").await;
            // Half of them send a byte at a time, the others none.
            while id.is_multiple_of(2) && connection.write_all(b"x").await.is_ok() {
                if timeout(Duration::from_millis(5), connection.readable()).await.is_ok() {
                    break;
                }
            }
            status(connection).await
        };
        let quick = async {
            for id in 1000..1050 {
                assert_eq!(status(reader(&server, "/quick", id).await).await, 200, "nobody stands in the way");
            }
        };
        let (refused, ()) = futures_util::join!(join_all((0..WRITERS).map(slow)), quick);
        assert_eq!(refused, [408; WRITERS]);
        server.is_idle().await;
    };
    let most = server.watching(work).await;
    assert!(most.running < MAX_IN_FLIGHT && most.waiting == 0, "the slow have run, or waited: {most:?}");
    assert_eq!(server.runs().len(), 50);
    server.has_run_nothing_twice();
    let timeouts = r#"idempotency_requests_total{contract="webhook",outcome="refused",reason="body_timeout"}"#;
    assert_eq!(server.metrics().get(timeouts), 64.0);
}

#[tokio::test]
async fn writers_that_stall_a_streamed_body_hold_no_more_than_may_run() {
    let recorder = recorder();
    let _guard = metrics::set_default_local_recorder(&recorder);
    let server = Server::start(&recorder, IdempotencyLayer::stream_request_body).await;
    let work = async {
        let head = |id: usize| format!("POST /reads HTTP/1.1\r\nx-id: {id}\r\ncontent-length: 1000");
        let stalled = join_all((0..MAX_IN_FLIGHT).map(async |id| client(&server, &head(id), b"x").await)).await;
        until(async || server.ledger.in_flight() == MAX_IN_FLIGHT).await;
        for id in 100..132 {
            assert_eq!(status(client(&server, &head(id), b"x").await).await, 503);
        }
        drop(stalled);
        server.is_idle().await;
    };
    let most = server.watching(work).await;
    assert_eq!(most.running, MAX_IN_FLIGHT);
    server.has_run_nothing_twice();
}

/// Opens streams and resets them as fast as it can, until the server has seen enough of them. Some are reset before they
/// are seen, some while they are read or wait, and some of them only when they have done what harm they can.
async fn flood(server: &Server, path: &str, id: impl Fn(usize) -> usize, harm: impl Fn() -> bool) {
    let mut sender = connect(server).await;
    let mut sent = 0;
    for round in 0.. {
        if server.requests() >= FLOOD {
            return;
        }
        if sender.is_closed() {
            sender = connect(server).await;
        }
        let streams: Vec<_> = (0..AT_ONCE)
            .map(|_| {
                sent += 1;
                let request = Request::post(format!("http://{}{path}", server.addr)).header("x-id", id(sent));
                sender.send_request(request.body(Full::new(Bytes::from_static(b"{}"))).unwrap())
            })
            .collect();
        match PAUSES.get(round % (PAUSES.len() + 1)) {
            Some(&pause) => {
                for _ in 0..pause {
                    yield_now().await;
                }
            }
            None => {
                let done = async {
                    while !harm() {
                        yield_now().await;
                    }
                };
                timeout(Duration::from_secs(90), done).await.expect("all the harm there may be");
            }
        }
        server.look();
        drop(streams);
    }
}

async fn connect(server: &Server) -> SendRequest<Full<Bytes>> {
    let stream = TcpStream::connect(server.addr).await.unwrap();
    let (sender, connection) = handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(async move {
        let _ = pin!(connection).await;
    });
    sender
}

#[tokio::test]
async fn streams_that_are_reset_with_one_key_run_it_once() {
    let recorder = recorder();
    let _guard = metrics::set_default_local_recorder(&recorder);
    let server = Server::start(&recorder, |layer| layer).await;
    let work = async {
        flood(&server, "/gated", |_| 0, || server.ledger.waiting() == MAX_WAITING).await;
        server.open();
        server.is_idle().await;
        assert_eq!(status(reader(&server, "/gated", 0).await).await, 200);
    };
    let most = server.watching(work).await;
    assert_eq!((most.running, most.waiting, most.handlers), (1, MAX_WAITING, 1));
    assert_eq!(server.runs().len(), 1);
    server.has_run_nothing_twice();
}

#[tokio::test]
async fn streams_that_are_reset_with_many_keys_run_no_more_than_may_run() {
    let recorder = recorder();
    let _guard = metrics::set_default_local_recorder(&recorder);
    let server = Server::start(&recorder, |layer| layer).await;
    let work = async {
        flood(&server, "/quick", |sent| sent, || server.ledger.in_flight() == MAX_IN_FLIGHT).await;
        server.is_idle().await;
    };
    let most = server.watching(work).await;
    assert_eq!((most.running, most.handlers), (MAX_IN_FLIGHT, MAX_IN_FLIGHT));
    assert!(server.runs().len() > 100, "{} have run", server.runs().len());
    server.has_run_nothing_twice();
}

#[tokio::test]
async fn streams_that_are_reset_while_the_store_hangs_leave_no_more_claims_than_may_be_given_up() {
    let recorder = recorder();
    let _guard = metrics::set_default_local_recorder(&recorder);
    let stores = Stores::memory();
    let server = Server::start_on(stores.store(), &recorder, |layer| layer.lease(Duration::from_secs(300))).await;
    let work = async {
        stores.fail(Step::Claim, Fault::Hang, u32::MAX);
        stores.fail(Step::Release, Fault::Hang, u32::MAX);
        flood(&server, "/quick", |sent| sent, || server.ledger.in_flight() == MAX_IN_FLIGHT).await;
        assert!(server.runs().is_empty());
        // The claims that are released are all that is left of it, and so are their tasks.
        until(async || server.tasks() <= MAX_GIVEN_UP).await;
        stores.heal();
        server.is_idle().await;
        assert_eq!(status(reader(&server, "/quick", 1).await).await, 200);
    };
    let most = server.watching(work).await;
    assert_eq!((most.running, most.given_up), (MAX_IN_FLIGHT, MAX_GIVEN_UP));
    server.has_run_nothing_twice();
}
